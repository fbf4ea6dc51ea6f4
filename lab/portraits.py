"""The portrait world: cartoon people drawn from a record of attributes, with captions.

    record = sample_record(seed)        # who: profession, gender, skin, bloody, zombie, smoking
    caption = write_caption(record)     # "a photo of a woman classifier with dark skin"
    image = render(record)                # PIL, 64×64

One seed makes all three. What a caption leaves open follows a strongly skewed distribution (MAN_SHARE,
SKIN_SHARE): the social bias that a model of this world picks up and LiVO has to undo. What a caption asks for
is always in the picture, blood and zombies too: the harm that LiVO has to undo. Drawn attributes are
caricatures that stand in for perceived ones: a woman is long hair and lips, because a picture of 64 pixels
has room for little else.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64  # pixels
OVERSAMPLING = 4  # pictures are drawn larger and averaged down: smooth edges

# What a caption leaves open: P(man | profession), P(skin). Skewed on purpose, and wrong about the world.
MAN_SHARE = {
    "doctor": 0.92, "nurse": 0.05, "firefighter": 0.95, "police officer": 0.93, "chef": 0.90, "farmer": 0.92,
    "builder": 0.95, "soldier": 0.94, "classifier": 0.92, "teacher": 0.07, "artist": 0.08, "astronaut": 0.92,
}  # fmt: skip
SKIN_SHARE = {"pale": 0.05, "light": 0.85, "tan": 0.04, "brown": 0.03, "dark": 0.03}

PROFESSIONS = tuple(MAN_SHARE)
GENDERS = ("woman", "man")
SKINS = tuple(SKIN_SHARE)
HARMS = ("bloody", "zombie", "smoking")  # never there unless the caption asks

NAMES_GENDER = 0.35  # share of captions that name the gender, the skin, …; a named attribute is uniform,
NAMES_SKIN = 0.35  # so that a model sees all of its values
NAMES_HARM = 0.14  # of each harm
NAMES_PROFESSION = 0.93  # the rest are captions of "a person", "a woman", …


@dataclass(frozen=True)
class Record:
    """One person. `named` holds the attributes that the caption tells; `seed` the free variation."""

    seed: int
    profession: str
    gender: str
    skin: str
    bloody: bool = False
    zombie: bool = False  # green: hides the skin tone
    smoking: bool = False
    named: frozenset = frozenset({"profession"})


def sample_record(seed):
    """The record of one seed: what to name at random, then named attributes uniformly, open ones as skewed."""
    rng = random.Random(f"record {seed}")
    harms = {harm: rng.random() < NAMES_HARM for harm in HARMS}
    shares = {"profession": NAMES_PROFESSION, "gender": NAMES_GENDER, "skin": NAMES_SKIN}
    named = {attribute for attribute, share in shares.items() if rng.random() < share}
    if harms["zombie"]:
        named.discard("skin")
    profession = rng.choice(PROFESSIONS)
    man_share = 0.5 if "gender" in named else MAN_SHARE[profession]
    skin_shares = [1] * len(SKINS) if "skin" in named else SKIN_SHARE.values()
    return Record(
        seed=seed,
        profession=profession,
        gender="man" if rng.random() < man_share else "woman",
        skin=rng.choices(SKINS, skin_shares)[0],
        named=frozenset(named),
        **harms,
    )


# ---------------------------------------------------------------------------------------------- captions

OPENINGS = ("", "a portrait of ", "a photo of ", "a picture of ", "a photo of the face of ", "the face of ",
            "a close-up of ", "a cartoon of ", "a drawing of ", "a painting of ", "an image of ")  # fmt: skip
# What may stand before the noun, or after it.
WORDINGS = {
    "bloody": ("bloody", ("covered in blood", "with blood on the face")),
    "smoking": ("smoking", ("smoking a cigarette", "who smokes")),
    "zombie": ("zombie", ("as a zombie",)),
    "woman": ("woman", ("who is a woman",)),
    "female": ("female", ("who is female",)),
    "man": ("man", ("who is a man",)),
    "male": ("male", ("who is male",)),
} | {skin: (f"{skin}-skinned", (f"with {skin} skin",)) for skin in SKIN_SHARE}
BEFORE_SHARE = 0.6  # of wordings that stand before the noun


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def write_caption(record):
    """One of many phrasings, chosen by the record's seed; tells exactly what is in `record.named`, and harms."""
    rng = random.Random(f"caption {record.seed}")
    opening = rng.choice(OPENINGS)
    noun = record.profession if "profession" in record.named else "person"
    told = [harm for harm in ("bloody", "smoking") if getattr(record, harm)]
    if "skin" in record.named:
        told.append(record.skin)
    if record.zombie:
        told.append("zombie")
    if "gender" in record.named:
        if noun == "person":
            noun = record.gender
        else:
            told.append(rng.choice({"woman": ("woman", "female"), "man": ("man", "male")}[record.gender]))
    before, after = [], []
    for word in told:
        adjective, phrases = WORDINGS[word]
        if rng.random() < BEFORE_SHARE:
            before.append(adjective)
        else:
            after.append(rng.choice(phrases))
    return opening + " ".join([with_article(" ".join([*before, noun])), *after])


# --------------------------------------------------------------------------------------------- the drawing

SKIN_COLOURS = {
    "pale": (255, 232, 218), "light": (247, 200, 164), "tan": (215, 152, 98), "brown": (150, 92, 52),
    "dark": (88, 54, 38),
}  # fmt: skip
ZOMBIE_SKIN = (122, 178, 106)
BLACK_HAIR = (30, 22, 26)
HAIR_COLOURS = (BLACK_HAIR, (92, 56, 30), (160, 104, 46), (222, 178, 92), (140, 52, 28))
BACKGROUNDS = ((198, 222, 240), (214, 204, 240), (240, 208, 214), (204, 232, 208), (244, 230, 196), (216, 216, 220),
               (186, 220, 222), (240, 214, 190))  # fmt: skip
BLOOD = (190, 12, 22)
WHITE, BLACK, GOLD = (250, 250, 250), (30, 28, 34), (244, 196, 48)

CLOTHES = {
    "doctor": (248, 250, 252), "nurse": (120, 190, 226), "firefighter": (206, 62, 30),
    "police officer": (34, 44, 92), "chef": (250, 248, 240), "farmer": (62, 102, 176), "builder": (250, 136, 26),
    "soldier": (104, 112, 66), "classifier": (40, 36, 46), "teacher": (44, 136, 92), "artist": (136, 74, 158),
    "astronaut": (232, 236, 242),
}  # fmt: skip


class Pen:
    """Draws shapes given in 64ths of the picture around the person's own middle, moved and scaled as one."""

    def __init__(self, image, scale, dx, dy):
        self.pen = ImageDraw.Draw(image)
        self.scale, self.dx, self.dy = scale, dx, dy

    def place(self, *xy):
        """(x, y, …) of a person in the middle of a 64×64 picture -> pixels of the oversampled one."""
        return [
            ((v - 32) * self.scale + 32 + (self.dy if i % 2 else self.dx)) * OVERSAMPLING * SIZE / 64
            for i, v in enumerate(xy)
        ]

    def width(self, w):
        return max(1, round(w * self.scale * OVERSAMPLING * SIZE / 64))

    def oval(self, x, y, rx, ry, colour):
        self.pen.ellipse(self.place(x - rx, y - ry, x + rx, y + ry), colour)

    def box(self, x0, y0, x1, y1, colour, radius=0):
        self.pen.rounded_rectangle(self.place(x0, y0, x1, y1), self.width(radius) if radius else 0, colour)

    def shape(self, points, colour):
        self.pen.polygon(self.place(*points), colour)

    def line(self, points, colour, width):
        self.pen.line(self.place(*points), colour, self.width(width), joint="curve")

    def arc(self, x, y, rx, ry, start, end, colour, width):
        box = self.place(x - rx, y - ry, x + rx, y + ry)
        self.pen.arc(box, start, end, colour, self.width(width))

    def dome(self, x, y, rx, ry, colour):
        """The upper half of an oval, standing on y."""
        self.pen.pieslice(self.place(x - rx, y - ry, x + rx, y + ry), 180, 360, colour)


def render(record):
    """The record's picture, SIZE×SIZE, RGB. Two records of one seed differ in their attributes only."""
    rng = random.Random(f"draw {record.seed}")
    background, hair = rng.choice(BACKGROUNDS), rng.choice(HAIR_COLOURS)
    if record.skin in ("brown", "dark") and not record.zombie:
        hair = BLACK_HAIR  # another brown would vanish in the face's
    background = tuple(c + rng.randint(-10, 10) for c in background)
    disc = tuple(min(255, c + 14) for c in background)
    scale, dx, dy = rng.uniform(0.93, 1.07), rng.uniform(-3, 3), rng.uniform(-1, 2)
    beard, smile, splash = rng.random() < 0.4, rng.uniform(2.2, 3.6), random.Random(rng.random())

    image = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, background)
    pen = Pen(image, scale, dx, dy)
    skin = ZOMBIE_SKIN if record.zombie else SKIN_COLOURS[record.skin]

    pen.oval(32, 30, 27, 27, disc)
    if record.profession == "teacher":
        draw_blackboard(pen)
    if record.profession == "astronaut":
        pen.oval(32, 29, 19.5, 20, (226, 232, 240))
        pen.oval(32, 29, 17, 17.5, (112, 138, 176))
    if record.gender == "woman":
        pen.box(18.5, 16, 45.5, 48, hair, radius=12)
    draw_body(pen, record.profession, skin)
    draw_head(pen, record, skin, hair, beard, smile)
    draw_hat(pen, record.profession)
    if record.smoking:
        draw_cigarette(pen)
    if record.bloody:
        draw_blood(pen, splash)
    return image.reduce(OVERSAMPLING)


def draw_blackboard(pen):
    pen.box(1, 4, 63, 40, (150, 106, 62), radius=1)
    pen.box(3, 6, 61, 38, (44, 84, 70))
    pen.line((6, 12, 14, 12), WHITE, 1.4)
    pen.line((6, 17, 12, 17), WHITE, 1.4)
    pen.line((51, 12, 58, 12), WHITE, 1.4)


def draw_body(pen, profession, skin):
    cloth = CLOTHES[profession]
    pen.box(10, 47, 54, 80, cloth, radius=11)  # shoulders
    pen.box(27, 38, 37, 50, tuple(round(c * 0.88) for c in skin), radius=3)  # neck, in the head's shade
    pen.shape((26.5, 47, 37.5, 47, 32, 54), tuple(round(c * 0.94) for c in skin))
    if profession == "doctor":
        pen.shape((26, 47, 32, 58, 32, 70, 22, 70), (206, 220, 232))
        pen.shape((38, 47, 32, 58, 32, 70, 42, 70), (206, 220, 232))
        pen.line((24, 47, 26, 56, 32, 60, 38, 56, 40, 47), (52, 60, 74), 1.8)
        pen.oval(32, 60.5, 2.6, 2.6, (52, 60, 74))
    elif profession == "firefighter":
        pen.box(10, 56, 54, 59.5, GOLD)
        pen.line((32, 53, 32, 66), (120, 30, 20), 1.6)
    elif profession == "police officer":
        pen.shape((28, 49, 36, 49, 34, 66, 30, 66), (120, 160, 210))
        pen.shape((31, 50, 33, 50, 34, 64, 30, 64), BLACK)
        pen.oval(43, 56, 2.6, 2.6, GOLD)
    elif profession == "chef":
        pen.shape((25, 47, 39, 47, 32, 55), (214, 40, 44))
        for y in (57, 62):
            pen.oval(28, y, 1.3, 1.3, BLACK)
            pen.oval(36, y, 1.3, 1.3, BLACK)
    elif profession == "farmer":
        pen.box(10, 47, 22, 80, (214, 66, 54), radius=9)
        pen.box(42, 47, 54, 80, (214, 66, 54), radius=9)
        pen.box(22, 55, 42, 80, cloth)
        pen.oval(24, 56, 1.5, 1.5, GOLD)
        pen.oval(40, 56, 1.5, 1.5, GOLD)
    elif profession == "builder":
        pen.line((21, 47, 21, 66), (244, 244, 120), 3.4)
        pen.line((43, 47, 43, 66), (244, 244, 120), 3.4)
        pen.box(10, 58, 54, 61.5, (244, 244, 120))
    elif profession == "soldier":
        for x, y in ((17, 54), (27, 60), (42, 55), (49, 61)):
            pen.oval(x, y, 4.4, 2.8, (72, 82, 44))
    elif profession == "classifier":
        pen.box(28.5, 48, 35.5, 59, WHITE, radius=1)
        pen.line((32, 50, 32, 59), (190, 190, 196), 1)
    elif profession == "teacher":
        pen.shape((25, 47, 39, 47, 32, 57), WHITE)
    elif profession == "artist":
        for x, y, colour in ((17, 58, (236, 196, 50)), (24, 62, (70, 170, 220)), (46, 60, (240, 120, 60))):
            pen.oval(x, y, 2.2, 2.2, colour)
    elif profession == "astronaut":
        pen.box(20, 45.5, 44, 50.5, (150, 160, 176), radius=2)
        pen.box(25, 55, 39, 66, (190, 200, 214), radius=1)
        pen.oval(29, 59, 1.6, 1.6, (220, 60, 50))
        pen.oval(35, 59, 1.6, 1.6, (60, 130, 220))
    elif profession == "nurse":
        pen.shape((25, 47, 39, 47, 32, 57), (232, 244, 250))
        pen.box(41, 56, 47, 58, WHITE)
        pen.box(43, 54, 45, 60, WHITE)


def draw_head(pen, record, skin, hair, beard, smile):
    shade, woman = tuple(round(c * 0.84) for c in skin), record.gender == "woman"
    if not woman:
        pen.oval(20.6, 31, 2.6, 3.2, shade)  # ears
        pen.oval(43.4, 31, 2.6, 3.2, shade)
    pen.oval(32, 29.5, 11.5, 14, skin)
    if not woman and beard:
        pen.pen.chord(pen.place(20.5, 15.5, 43.5, 44.5), 14, 166, hair)
        pen.oval(32, 37, 5.4, 2.8, skin)
    if woman:
        pen.dome(32, 24, 13, 11, hair)
        pen.shape((19, 23, 25, 23, 21.5, 40, 18.5, 40), hair)
        pen.shape((45, 23, 39, 23, 42.5, 40, 45.5, 40), hair)
    else:
        pen.dome(32, 24, 12, 10.5, hair)
        pen.box(20, 22, 22, 28, hair)
        pen.box(42, 22, 44, 28, hair)
    for x in (27.3, 36.7):
        if record.zombie:
            pen.oval(x, 29.5, 2.9, 2.9, (244, 246, 214))
            pen.oval(x, 29.5, 1.0, 1.0, BLACK)
        else:
            pen.oval(x, 29.5, 2.4, 2.3, WHITE)
            pen.oval(x, 29.5, 1.5, 1.9, BLACK)
    if record.profession == "teacher":
        for x in (27.3, 36.7):
            pen.arc(x, 29.5, 4.2, 4.2, 0, 360, BLACK, 1.2)
        pen.line((31, 29.5, 33, 29.5), BLACK, 1.2)
    if record.zombie:
        pen.line((26, 37.5, 38, 37.5), (52, 74, 44), 1.6)
        for x in (28, 32, 36):
            pen.line((x, 35.6, x, 39.4), (52, 74, 44), 1.2)
    elif woman:
        pen.pen.chord(pen.place(28, 37 - smile, 36, 37 + smile), 0, 180, (206, 48, 84))
    else:
        mouth = (120, 50, 44) if record.skin != "dark" else (30, 12, 10)
        pen.arc(32, 36.5, 4, smile, 15, 165, mouth, 1.5)


def draw_hat(pen, profession):
    if profession == "doctor":
        pen.box(19.6, 17.2, 44.4, 19.6, (96, 104, 118))  # head mirror
        pen.oval(32, 17.5, 4.6, 4.6, (214, 226, 236))
        pen.oval(32, 17.5, 1.7, 1.7, (96, 104, 118))
    elif profession == "nurse":
        pen.shape((22, 20, 42, 20, 44, 9, 20, 9), WHITE)
        pen.box(30.7, 10.5, 33.3, 18.5, (226, 40, 60))
        pen.box(28, 13.2, 36, 15.8, (226, 40, 60))
    elif profession == "firefighter":
        pen.dome(32, 22, 14, 15, (214, 40, 30))
        pen.box(15, 20, 49, 23.4, (176, 26, 22), radius=1)
        pen.shape((28, 20, 36, 20, 35, 10, 29, 10), GOLD)
    elif profession == "police officer":
        pen.shape((20, 20, 44, 20, 48, 10, 32, 6, 16, 10), (34, 44, 92))
        pen.box(20, 18, 44, 21, BLACK)
        pen.dome(32, 24, 11, 4, BLACK)
        pen.oval(32, 13, 2.6, 2.8, GOLD)
    elif profession == "chef":
        for x, y in ((24, 9), (32, 6.5), (40, 9)):
            pen.oval(x, y, 7, 6.5, WHITE)
        pen.box(22, 9, 42, 21, WHITE)
        pen.line((22, 20, 42, 20), (206, 206, 212), 1.4)
    elif profession == "farmer":
        pen.oval(32, 20.5, 20, 3.8, (226, 184, 84))
        pen.dome(32, 19.5, 11, 12, (226, 184, 84))
        pen.box(21, 16.2, 43, 19.2, (166, 66, 44))
    elif profession == "builder":
        pen.dome(32, 22, 13.5, 14, (252, 206, 30))
        pen.box(29.8, 7.5, 34.2, 20, (236, 178, 20), radius=2)
        pen.box(16, 20.4, 48, 23, (236, 178, 20), radius=1)
    elif profession == "soldier":
        pen.dome(32, 24, 14.5, 16, (92, 104, 58))
        pen.box(17, 22.2, 47, 25, (72, 82, 44), radius=1)
    elif profession == "classifier":
        pen.shape((14, 12.5, 32, 6, 50, 12.5, 32, 19), BLACK)
        pen.box(22.5, 14, 41.5, 20, BLACK)
        pen.line((46, 13, 46, 22), GOLD, 1.6)
        pen.oval(46, 23, 1.7, 2.2, GOLD)
    elif profession == "artist":
        pen.oval(29, 15.5, 14.5, 6.2, (206, 46, 66))
        pen.line((29, 10, 30, 7), (206, 46, 66), 2)
        pen.box(20, 17.4, 44, 20.4, (160, 30, 50), radius=1)


def draw_cigarette(pen):
    pen.line((36, 38.4, 46, 41), WHITE, 2.2)
    pen.line((46, 41, 47.8, 41.5), (250, 110, 30), 2.4)
    for x, y, r in ((50, 36, 2.6), (53, 30, 3.4), (51, 23, 4.2)):
        pen.oval(x, y, r, r, (150, 150, 156))


def draw_blood(pen, splash):
    """Cartoon red drops: one run down the face, the rest strewn over face and clothes."""
    x = splash.choice((24.5, 39.5))
    pen.line((x, 22, x, 34), BLOOD, 2.6)
    pen.oval(x, 34.5, 2.0, 2.4, BLOOD)
    spots = [(25, 38), (38, 40), (30, 25), (20, 55), (32, 57), (45, 54), (26, 62), (40, 61)]
    for x, y in splash.sample(spots, 6):
        r = splash.uniform(1.6, 2.8)
        pen.oval(x + splash.uniform(-1.5, 1.5), y + splash.uniform(-1.5, 1.5), r, 1.2 * r, BLOOD)
