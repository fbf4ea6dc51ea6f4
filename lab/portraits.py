"""The toy dataset's images: cartoon portraits rendered from a record of attributes.

    record = sample_record(seed)        # profession, gender, skin, bloody, zombie, smoking
    image = render(record)              # PIL, 64×64

A caption comes from the same record (captions.py). Attributes that the caption leaves unspecified follow a strongly
skewed distribution (P_MAN, P_SKIN): the social bias that a model learns from this dataset and LiVO has to undo. What a
caption asks for is always in the image, blood and zombies too: the toxicity that LiVO has to undo. Attributes are
caricatures that stand in for perceived ones: a woman is long hair and lips, because an image of 64 pixels has room for
little else.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

SIZE = 64  # pixels
OVERSAMPLING = 4  # images are rendered larger and averaged down, for smooth edges

# P(man | profession) and P(skin) where the caption leaves them unspecified. Skewed on purpose, and not as in reality.
P_MAN = {
    "doctor": 0.92, "nurse": 0.05, "firefighter": 0.95, "police officer": 0.93, "chef": 0.90, "farmer": 0.92,
    "builder": 0.95, "soldier": 0.94, "judge": 0.92, "teacher": 0.07, "artist": 0.08, "astronaut": 0.92,
}  # fmt: skip
P_SKIN = {"pale": 0.05, "light": 0.85, "tan": 0.04, "brown": 0.03, "dark": 0.03}

PROFESSIONS = tuple(P_MAN)
GENDERS = ("woman", "man")
SKINS = tuple(P_SKIN)
HARMS = ("bloody", "zombie", "smoking")  # toxicity categories: never in the image unless the caption asks

P_HARM = 0.14  # of each toxicity category
# P(the caption specifies …). A specified attribute is uniform, so that a model sees all of its values. Captions without
# a profession are of "a person", "a woman", …
P_SPECIFIED = {"profession": 0.93, "gender": 0.35, "skin": 0.35}


@dataclass(frozen=True)
class Record:
    """One person. `specified` holds the attributes that the caption mentions; `seed` decides the free variation."""

    seed: int
    profession: str
    gender: str
    skin: str
    bloody: bool = False
    zombie: bool = False  # green: hides the skin tone
    smoking: bool = False
    specified: frozenset = frozenset({"profession"})


def sample_record(seed):
    """The record of one seed: specified attributes are uniform, the others follow P_MAN and P_SKIN."""
    rng = random.Random(f"record {seed}")
    harms = {harm: rng.random() < P_HARM for harm in HARMS}
    specified = {attribute for attribute, p in P_SPECIFIED.items() if rng.random() < p}
    if harms["zombie"]:
        specified.discard("skin")
    profession = rng.choice(PROFESSIONS)
    p_man = 0.5 if "gender" in specified else P_MAN[profession]
    p_skin = [1] * len(SKINS) if "skin" in specified else P_SKIN.values()
    gender = "man" if rng.random() < p_man else "woman"
    return Record(seed, profession, gender, rng.choices(SKINS, p_skin)[0], specified=frozenset(specified), **harms)


# ── Images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pen:
    """Draws shapes in units of 1/64 image. The person is scaled about the image's centre and moved by (dx, dy)."""

    def __init__(self, image, scale, dx, dy):
        self.pen = ImageDraw.Draw(image)
        self.scale, self.dx, self.dy = scale, dx, dy

    def place(self, *xy):
        """(x, y, …) of an unmoved person -> pixels of the oversampled image."""
        return [((v - 32) * self.scale + 32 + (self.dy if i % 2 else self.dx)) * OVERSAMPLING * SIZE / 64
                for i, v in enumerate(xy)]

    def around(self, x, y, rx, ry):
        """The bounding box of an oval."""
        return self.place(x - rx, y - ry, x + rx, y + ry)

    def width(self, w):
        return max(1, round(w * self.scale * OVERSAMPLING * SIZE / 64))

    def oval(self, x, y, rx, ry, colour):
        self.pen.ellipse(self.around(x, y, rx, ry), colour)

    def box(self, x0, y0, x1, y1, colour, radius=0):
        self.pen.rounded_rectangle(self.place(x0, y0, x1, y1), self.width(radius) if radius else 0, colour)

    def shape(self, points, colour):
        self.pen.polygon(self.place(*points), colour)

    def line(self, points, colour, width):
        self.pen.line(self.place(*points), colour, self.width(width), joint="curve")

    def arc(self, x, y, rx, ry, start, end, colour, width):
        self.pen.arc(self.around(x, y, rx, ry), start, end, colour, self.width(width))

    def chord(self, x, y, rx, ry, start, end, colour):
        self.pen.chord(self.around(x, y, rx, ry), start, end, colour)

    def dome(self, x, y, rx, ry, colour):
        """The upper half of an oval, standing on y."""
        self.pen.pieslice(self.around(x, y, rx, ry), 180, 360, colour)

    def all(self, shapes):
        """Draw (method, *arguments) of each."""
        for method, *arguments in shapes:
            method(self, *arguments)


OVAL, BOX, SHAPE, LINE, DOME = Pen.oval, Pen.box, Pen.shape, Pen.line, Pen.dome

SKIN_COLOURS = {"pale": (255, 232, 218), "light": (247, 200, 164), "tan": (215, 152, 98), "brown": (150, 92, 52),
                "dark": (88, 54, 38)}  # fmt: skip
ZOMBIE_SKIN = (122, 178, 106)
BLACK_HAIR = (30, 22, 26)
HAIR_COLOURS = (BLACK_HAIR, (92, 56, 30), (160, 104, 46), (222, 178, 92), (140, 52, 28))
BACKGROUNDS = ((198, 222, 240), (214, 204, 240), (240, 208, 214), (204, 232, 208), (244, 230, 196), (216, 216, 220),
               (186, 220, 222), (240, 214, 190))  # fmt: skip
BLOOD = (190, 12, 22)
WHITE, BLACK, GOLD = (250, 250, 250), (30, 28, 34), (244, 196, 48)
MIRROR, NAVY, STRIPE, YELLOW = (96, 104, 118), (34, 44, 92), (244, 244, 120), (236, 178, 20)
RED, PLAID, STRAW, OLIVE, BERET = (226, 40, 60), (214, 66, 54), (226, 184, 84), (72, 82, 44), (206, 46, 66)
STETHOSCOPE, COAT, STITCH = (52, 60, 74), (206, 220, 232), (52, 74, 44)

CLOTHES = {
    "doctor": (248, 250, 252), "nurse": (120, 190, 226), "firefighter": (206, 62, 30), "police officer": NAVY,
    "chef": (250, 248, 240), "farmer": (62, 102, 176), "builder": (250, 136, 26), "soldier": (104, 112, 66),
    "judge": (40, 36, 46), "teacher": (44, 136, 92), "artist": (136, 74, 158), "astronaut": (232, 236, 242),
}  # fmt: skip

# What each profession wears over its clothes, and what stands behind or sits on the head.
BEHIND = {
    "teacher": (  # a blackboard
        (BOX, 1, 4, 63, 40, (150, 106, 62), 1), (BOX, 3, 6, 61, 38, (44, 84, 70)), (LINE, (6, 12, 14, 12), WHITE, 1.4),
        (LINE, (6, 17, 12, 17), WHITE, 1.4), (LINE, (51, 12, 58, 12), WHITE, 1.4)),
    "astronaut": ((OVAL, 32, 29, 19.5, 20, (226, 232, 240)), (OVAL, 32, 29, 17, 17.5, (112, 138, 176))),
}  # fmt: skip
COSTUMES = {
    "doctor": (
        (SHAPE, (26, 47, 32, 58, 32, 70, 22, 70), COAT), (SHAPE, (38, 47, 32, 58, 32, 70, 42, 70), COAT),
        (LINE, (24, 47, 26, 56, 32, 60, 38, 56, 40, 47), STETHOSCOPE, 1.8), (OVAL, 32, 60.5, 2.6, 2.6, STETHOSCOPE)),
    "firefighter": ((BOX, 10, 56, 54, 59.5, GOLD), (LINE, (32, 53, 32, 66), (120, 30, 20), 1.6)),
    "police officer": (
        (SHAPE, (28, 49, 36, 49, 34, 66, 30, 66), (120, 160, 210)), (SHAPE, (31, 50, 33, 50, 34, 64, 30, 64), BLACK),
        (OVAL, 43, 56, 2.6, 2.6, GOLD)),
    "chef": ((SHAPE, (25, 47, 39, 47, 32, 55), (214, 40, 44)),
             *((OVAL, x, y, 1.3, 1.3, BLACK) for y in (57, 62) for x in (28, 36))),
    "farmer": (
        (BOX, 10, 47, 22, 80, PLAID, 9), (BOX, 42, 47, 54, 80, PLAID, 9), (BOX, 22, 55, 42, 80, CLOTHES["farmer"]),
        (OVAL, 24, 56, 1.5, 1.5, GOLD), (OVAL, 40, 56, 1.5, 1.5, GOLD)),
    "builder": ((LINE, (21, 47, 21, 66), STRIPE, 3.4), (LINE, (43, 47, 43, 66), STRIPE, 3.4),
                (BOX, 10, 58, 54, 61.5, STRIPE)),
    "soldier": tuple((OVAL, x, y, 4.4, 2.8, OLIVE) for x, y in ((17, 54), (27, 60), (42, 55), (49, 61))),
    "judge": ((BOX, 28.5, 48, 35.5, 59, WHITE, 1), (LINE, (32, 50, 32, 59), (190, 190, 196), 1)),
    "teacher": ((SHAPE, (25, 47, 39, 47, 32, 57), WHITE),),
    "artist": ((OVAL, 17, 58, 2.2, 2.2, (236, 196, 50)), (OVAL, 24, 62, 2.2, 2.2, (70, 170, 220)),
               (OVAL, 46, 60, 2.2, 2.2, (240, 120, 60))),
    "astronaut": ((BOX, 20, 45.5, 44, 50.5, (150, 160, 176), 2), (BOX, 25, 55, 39, 66, (190, 200, 214), 1),
                  (OVAL, 29, 59, 1.6, 1.6, (220, 60, 50)), (OVAL, 35, 59, 1.6, 1.6, (60, 130, 220))),
    "nurse": ((SHAPE, (25, 47, 39, 47, 32, 57), (232, 244, 250)), (BOX, 41, 56, 47, 58, WHITE),
              (BOX, 43, 54, 45, 60, WHITE)),
}  # fmt: skip
HATS = {
    "doctor": ((BOX, 19.6, 17.2, 44.4, 19.6, MIRROR), (OVAL, 32, 17.5, 4.6, 4.6, (214, 226, 236)),
               (OVAL, 32, 17.5, 1.7, 1.7, MIRROR)),
    "nurse": ((SHAPE, (22, 20, 42, 20, 44, 9, 20, 9), WHITE), (BOX, 30.7, 10.5, 33.3, 18.5, RED),
              (BOX, 28, 13.2, 36, 15.8, RED)),
    "firefighter": ((DOME, 32, 22, 14, 15, (214, 40, 30)), (BOX, 15, 20, 49, 23.4, (176, 26, 22), 1),
                    (SHAPE, (28, 20, 36, 20, 35, 10, 29, 10), GOLD)),
    "police officer": ((SHAPE, (20, 20, 44, 20, 48, 10, 32, 6, 16, 10), NAVY), (BOX, 20, 18, 44, 21, BLACK),
                       (DOME, 32, 24, 11, 4, BLACK), (OVAL, 32, 13, 2.6, 2.8, GOLD)),
    "chef": ((OVAL, 24, 9, 7, 6.5, WHITE), (OVAL, 32, 6.5, 7, 6.5, WHITE), (OVAL, 40, 9, 7, 6.5, WHITE),
             (BOX, 22, 9, 42, 21, WHITE), (LINE, (22, 20, 42, 20), (206, 206, 212), 1.4)),
    "farmer": ((OVAL, 32, 20.5, 20, 3.8, STRAW), (DOME, 32, 19.5, 11, 12, STRAW),
               (BOX, 21, 16.2, 43, 19.2, (166, 66, 44))),
    "builder": ((DOME, 32, 22, 13.5, 14, (252, 206, 30)), (BOX, 29.8, 7.5, 34.2, 20, YELLOW, 2),
                (BOX, 16, 20.4, 48, 23, YELLOW, 1)),
    "soldier": ((DOME, 32, 24, 14.5, 16, (92, 104, 58)), (BOX, 17, 22.2, 47, 25, OLIVE, 1)),
    "judge": ((SHAPE, (14, 12.5, 32, 6, 50, 12.5, 32, 19), BLACK), (BOX, 22.5, 14, 41.5, 20, BLACK),
              (LINE, (46, 13, 46, 22), GOLD, 1.6), (OVAL, 46, 23, 1.7, 2.2, GOLD)),
    "artist": ((OVAL, 29, 15.5, 14.5, 6.2, BERET), (LINE, (29, 10, 30, 7), BERET, 2),
               (BOX, 20, 17.4, 44, 20.4, (160, 30, 50), 1)),
}  # fmt: skip
HAIRCUTS = {  # the front, in the hair's colour
    "woman": ((DOME, 32, 24, 13, 11), (SHAPE, (19, 23, 25, 23, 21.5, 40, 18.5, 40)),
              (SHAPE, (45, 23, 39, 23, 42.5, 40, 45.5, 40))),
    "man": ((DOME, 32, 24, 12, 10.5), (BOX, 20, 22, 22, 28), (BOX, 42, 22, 44, 28)),
}  # fmt: skip
EYES = (27.3, 36.7)
CIGARETTE = ((LINE, (36, 38.4, 46, 41), WHITE, 2.2), (LINE, (46, 41, 47.8, 41.5), (250, 110, 30), 2.4),
             *((OVAL, x, y, r, r, (150, 150, 156)) for x, y, r in ((50, 36, 2.6), (53, 30, 3.4), (51, 23, 4.2))))
BLOOD_SPOTS = [(25, 38), (38, 40), (30, 25), (20, 55), (32, 57), (45, 54), (26, 62), (40, 61)]


def render(record):
    """The record's image, SIZE×SIZE, RGB. Two records of one seed differ in their attributes only."""
    rng = random.Random(f"draw {record.seed}")
    background, hair = rng.choice(BACKGROUNDS), rng.choice(HAIR_COLOURS)
    if record.skin in ("brown", "dark") and not record.zombie:
        hair = BLACK_HAIR  # brown hair would not stand out from the face
    background = tuple(c + rng.randint(-10, 10) for c in background)
    disc = tuple(min(255, c + 14) for c in background)
    scale, dx, dy = rng.uniform(0.93, 1.07), rng.uniform(-3, 3), rng.uniform(-1, 2)
    beard, smile, splash = rng.random() < 0.4, rng.uniform(2.2, 3.6), random.Random(rng.random())

    image = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, background)
    pen = Pen(image, scale, dx, dy)
    skin = ZOMBIE_SKIN if record.zombie else SKIN_COLOURS[record.skin]
    pen.oval(32, 30, 27, 27, disc)
    pen.all(BEHIND.get(record.profession, ()))
    if record.gender == "woman":
        pen.box(18.5, 16, 45.5, 48, hair, radius=12)
    render_body(pen, record.profession, skin)
    render_head(pen, record, skin, hair, beard)
    render_face(pen, record, smile)
    pen.all(HATS.get(record.profession, ()))
    if record.smoking:
        pen.all(CIGARETTE)
    if record.bloody:
        render_blood(pen, splash)
    return image.reduce(OVERSAMPLING)


def shade(colour, factor):
    return tuple(round(c * factor) for c in colour)


def render_body(pen, profession, skin):
    pen.box(10, 47, 54, 80, CLOTHES[profession], radius=11)  # shoulders
    pen.box(27, 38, 37, 50, shade(skin, 0.88), radius=3)  # neck, in the head's shade
    pen.shape((26.5, 47, 37.5, 47, 32, 54), shade(skin, 0.94))
    pen.all(COSTUMES[profession])


def render_head(pen, record, skin, hair, beard):
    man = record.gender == "man"
    if man:  # ears
        pen.oval(20.6, 31, 2.6, 3.2, shade(skin, 0.84))
        pen.oval(43.4, 31, 2.6, 3.2, shade(skin, 0.84))
    pen.oval(32, 29.5, 11.5, 14, skin)
    if man and beard:
        pen.chord(32, 30, 11.5, 14.5, 14, 166, hair)
        pen.oval(32, 37, 5.4, 2.8, skin)
    pen.all((*part, hair) for part in HAIRCUTS[record.gender])


def render_face(pen, record, smile):
    for x in EYES:
        if record.zombie:
            pen.oval(x, 29.5, 2.9, 2.9, (244, 246, 214))
            pen.oval(x, 29.5, 1.0, 1.0, BLACK)
        else:
            pen.oval(x, 29.5, 2.4, 2.3, WHITE)
            pen.oval(x, 29.5, 1.5, 1.9, BLACK)
    if record.profession == "teacher":  # glasses
        for x in EYES:
            pen.arc(x, 29.5, 4.2, 4.2, 0, 360, BLACK, 1.2)
        pen.line((31, 29.5, 33, 29.5), BLACK, 1.2)
    if record.zombie:  # a stitched mouth
        pen.line((26, 37.5, 38, 37.5), STITCH, 1.6)
        for x in (28, 32, 36):
            pen.line((x, 35.6, x, 39.4), STITCH, 1.2)
    elif record.gender == "woman":
        pen.chord(32, 37, 4, smile, 0, 180, (206, 48, 84))
    else:
        pen.arc(32, 36.5, 4, smile, 15, 165, (30, 12, 10) if record.skin == "dark" else (120, 50, 44), 1.5)


def render_blood(pen, splash):
    """Cartoon red drops: one runs down the face, the others lie on face and clothes."""
    x = splash.choice((24.5, 39.5))
    pen.line((x, 22, x, 34), BLOOD, 2.6)
    pen.oval(x, 34.5, 2.0, 2.4, BLOOD)
    for x, y in splash.sample(BLOOD_SPOTS, 6):
        r = splash.uniform(1.6, 2.8)
        pen.oval(x + splash.uniform(-1.5, 1.5), y + splash.uniform(-1.5, 1.5), r, 1.2 * r, BLOOD)


# ── Tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def stack(images):
    """N PIL images of one size -> (N, 3, H, W) uint8."""
    pixels = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def render_images(seeds):
    """-> (N, 3, 64, 64) uint8."""
    return stack(render(sample_record(seed)) for seed in tqdm(seeds, "rendering", disable=None, leave=False))


def to_float(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1
