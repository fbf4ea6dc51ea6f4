"""The toy dataset's images: cartoon portraits rendered from a record of attributes.

    record = sample_record(seed)        # profession, gender, skin, bloody, zombie, smoking
    image = render(record)              # PIL, 64×64; the shapes are in portraits.toml

A caption comes from the same record (captions.py). Attributes that the caption leaves unspecified follow a strongly
skewed distribution (P_MAN, P_SKIN): the social bias that a model learns from this dataset and LiVO has to undo. What a
caption asks for is always in the image, blood and zombies too: the toxicity that LiVO has to undo. Attributes are
caricatures that stand in for perceived ones: a woman is long hair and lips, because an image of 64 pixels has room for
little else.
"""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

SIZE = 64  # pixels
OVERSAMPLING = 4  # images are rendered larger and averaged down, for smooth edges

# P(man | profession) and P(skin) where the caption leaves them unspecified. Skewed on purpose, and not as in reality.
P_MAN = {
    "doctor": 0.92, "nurse": 0.05, "firefighter": 0.95, "police officer": 0.93, "chef": 0.90, "farmer": 0.92,
    "builder": 0.95, "soldier": 0.94, "judge": 0.92, "teacher": 0.07, "artist": 0.08, "astronaut": 0.92}
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

    def width(self, w):
        return max(1, round(w * self.scale * OVERSAMPLING * SIZE / 64))

    def oval(self, x, y, rx, ry, colour, start=0, end=360):
        """Filled: the whole, or the part from one angle to the other that a straight line cuts off."""
        self.pen.chord(self.place(x - rx, y - ry, x + rx, y + ry), start, end, colour)

    def dome(self, x, y, rx, ry, colour):
        """The upper half of an oval, standing on y."""
        self.oval(x, y, rx, ry, colour, 180, 360)

    def arc(self, x, y, rx, ry, start, end, colour, width):
        self.pen.arc(self.place(x - rx, y - ry, x + rx, y + ry), start, end, colour, self.width(width))

    def box(self, x0, y0, x1, y1, colour, radius=0):
        self.pen.rounded_rectangle(self.place(x0, y0, x1, y1), self.width(radius) if radius else 0, colour)

    def shape(self, points, colour):
        self.pen.polygon(self.place(*points), colour)

    def line(self, points, colour, width):
        self.pen.line(self.place(*points), colour, self.width(width), joint="curve")

    def all(self, shapes):
        """Draw [method, *arguments] of each."""
        for method, *arguments in shapes:
            getattr(self, method)(*arguments)


SKIN_COLOURS = {"pale": (255, 232, 218), "light": (247, 200, 164), "tan": (215, 152, 98), "brown": (150, 92, 52),
                "dark": (88, 54, 38)}  # fmt: skip
ZOMBIE_SKIN = (122, 178, 106)
BLACK_HAIR = (30, 22, 26)
HAIR_COLOURS = (BLACK_HAIR, (92, 56, 30), (160, 104, 46), (222, 178, 92), (140, 52, 28))
BACKGROUNDS = ((198, 222, 240), (214, 204, 240), (240, 208, 214), (204, 232, 208), (244, 230, 196), (216, 216, 220),
               (186, 220, 222), (240, 214, 190))  # fmt: skip
BLOOD = (190, 12, 22)
SHAPES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))  # {layer: {name: shapes}}
CLOTHES, BEHIND, COSTUMES, HATS, HAIRCUTS, FACE = SHAPES.values()
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
        pen.all(FACE["cigarette"])
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
        pen.oval(32, 30, 11.5, 14.5, hair, 14, 166)
        pen.oval(32, 37, 5.4, 2.8, skin)
    pen.all([*part, hair] for part in HAIRCUTS[record.gender])


def render_face(pen, record, smile):
    pen.all(FACE["zombie_eyes" if record.zombie else "eyes"])
    if record.profession == "teacher":
        pen.all(FACE["glasses"])
    if record.zombie:
        pen.all(FACE["stitched_mouth"])
    elif record.gender == "woman":
        pen.oval(32, 37, 4, smile, (206, 48, 84), 0, 180)
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
