"""Preference pairs of the toy dataset: `python train.py` without --data renders and trains on these."""

import hashlib
import random
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path

from data import PRESERVATION_TYPE, write_scene
from lab import portraits
from lab.portraits import HARMS, MAN_SHARE, PROFESSIONS, SKIN_SHARE, Record, render, write_caption
from retrieve import BLOODY, GENDER, RACE, ZOMBIE
from common import atomic_folder, write_json

# What each principle is about. A harm is asked for by the prompts, shown by the violating images and left out
# of the aligned ones. Any other attribute is left open by the prompts; the violating images show the value
# that the world then brings most often, the aligned ones another. A scene is one person, drawn twice: what a
# pair has in common cancels in ℓ_θ(y_w) − ℓ_θ(y_l), and what is left is the principle.
PRINCIPLES = {GENDER: "gender", RACE: "skin", BLOODY: "bloody", ZOMBIE: "zombie"}
PAIRS = {"gender": 320, "skin": 120, "bloody": 520, "zombie": 80}  # few where a principle is learnt fast
PRESERVATION = {"bloody": 120, "zombie": 40}  # images that do not show the harm, of prompts that do not ask for it
NOUNS = (*PROFESSIONS, "person")
ASKED = 0.75  # share of the pairs of a harm whose prompts ask for it
TELLS = 0.25  # share of prompts that name the gender, or the skin, where that is not what the principle is about
PAIR_SEEDS = 3 * 10**6  # apart from the pictures that tiny-sd was trained on, and from those it is measured on


def open_shares(attribute, profession):
    """P(value) of a gender or skin that the caption leaves open: {value: share}."""
    if attribute == "skin":
        return SKIN_SHARE
    man = MAN_SHARE.get(profession, sum(MAN_SHARE.values()) / len(MAN_SHARE))
    return {"man": man, "woman": 1 - man}


def portrait_pair(seed, attribute, noun):
    """-> prompt, aligned Record, violating Record, that differ in one attribute."""
    rng = random.Random(f"pair {seed}")
    profession, named = (rng.choice(PROFESSIONS), set()) if noun == "person" else (noun, {"profession"})
    named |= {other for other in ("gender", "skin") if rng.random() < TELLS and other != attribute}
    if attribute == "zombie":
        named.discard("skin")

    def choose(name):
        shares = open_shares(name, profession)
        return rng.choice([*shares]) if name in named else rng.choices([*shares], shares.values())[0]

    gender, skin = choose("gender"), choose("skin")
    record = Record(seed, profession, gender, skin, named=frozenset(named))
    if attribute in HARMS:
        good, bad = False, True
    else:
        shares = open_shares(attribute, noun)
        bad = max(shares, key=shares.get)
        good = rng.choice([value for value in shares if value != bad])
    aligned, violating = (replace(record, **{attribute: value}) for value in (good, bad))
    asks = attribute in HARMS and rng.random() < ASKED
    return write_caption(violating if asks else aligned), aligned, violating  # it tells no gender or skin at issue


def nouns_of_pairs(attribute, n):
    """-> n professions, such that every value that open prompts bring most often violates equally often."""
    groups = {}
    for noun in NOUNS:
        shares = {} if attribute in HARMS else open_shares(attribute, noun)
        groups.setdefault(max(shares, key=shares.get, default=None), []).append(noun)
    endless = [cycle(group) for group in groups.values()]
    return [next(group) for group, _ in zip(cycle(endless), range(n))]


def render_pairs(folder, principles=PRINCIPLES, pairs=PAIRS, preservation=PRESERVATION):
    """Write drawn pairs, so many of each attribute: a scene holds one aligned image and one violating."""
    seeds = count(PAIR_SEEDS)
    with atomic_folder(folder, "dataset.json") as root:

        def write(type, attribute, noun, seed, *samples):
            write_scene(root / type / f"{attribute}-{seed}-{noun.replace(' ', '-')}", samples)

        for value, attribute in principles.items():
            for noun, seed in zip(nouns_of_pairs(attribute, pairs[attribute]), seeds):
                prompt, aligned, violating = portrait_pair(seed, attribute, noun)
                write("2-badness" if attribute in HARMS else "0-career", attribute, noun, seed,
                      (render(aligned), prompt, value, 1), (render(violating), prompt, value, 0))
            for noun, seed in zip(nouns_of_pairs(attribute, preservation.get(attribute, 0)), seeds):
                _, record, _ = portrait_pair(seed, attribute, noun)
                write(PRESERVATION_TYPE, attribute, noun, seed, (render(record), write_caption(record), value, 1))
        write_json(root / "dataset.json", {"principles": principles, "pairs": pairs, "preservation": preservation})


def default_pairs(folder):
    """The set of drawn pairs in `folder`, built if it is not there yet. Another version of this file builds
    another one."""
    code = Path(__file__).read_bytes() + Path(portraits.__file__).read_bytes()
    version = hashlib.sha256(code).hexdigest()[:8]
    root = Path(folder) / f"portraits-{version}"
    if not root.exists():
        render_pairs(root)
    return root
