"""Preference pairs of the toy dataset: `python train.py` without --data renders them and trains on them.

    root = default_pairs("runs")                                       # rendered at the first call: seconds
    render_pairs("more", pairs={"gender": 640}, preservation={}, principles={"gender equality": "gender"})

A scene is one person, rendered twice, so that a pair differs in one attribute. What it has in common cancels in
ℓ_θ(y_w) − ℓ_θ(y_l); the principle is left. A preservation scene is one image: the principle should not change it.
"""

import hashlib
import json
import random
import warnings
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path

from common import UserError, atomic_folder, read_json, write_json
from data import PRESERVATION_TYPE, read_samples
from formats.disk import cached
from lab.captions import write_caption
from lab.portraits import HARMS, P_MAN, P_SKIN, PROFESSIONS, Record, render
from retrieve import BLOODY, GENDER, RACE, ZOMBIE

JPEG_QUALITY = 95
BIAS_TYPE, TOXICITY_TYPE = "0-career", "toxicity"  # types of scenes, a folder each; the first is the authors'

# Each principle's protected attribute or toxicity category. A prompt asks for the toxicity, the violating image shows
# it, the aligned image does not. Prompts leave a protected attribute unspecified, the violating image shows the toy
# distribution's majority class, the aligned image another class.
PRINCIPLES = {GENDER: "gender", RACE: "skin", BLOODY: "bloody", ZOMBIE: "zombie"}
PAIRS = {"gender": 480, "skin": 120, "bloody": 520, "zombie": 200}
PRESERVATION = {"bloody": 240, "zombie": 120}  # images without the toxicity, of prompts that do not ask for it
# Copies of an aligned image in its scene. They bring the mean color of the aligned images near that of the majority
# class. Guidance multiplies a step towards this mean: without copies nearly all skins come out dark.
COPIES = {"pale": 3, "tan": 2}
NOUNS = (*PROFESSIONS, "person")
P_SPECIFIED = 0.25  # of a prompt that specifies the gender or the skin, where that is not the protected attribute
FIRST_SEED = 3 * 10**6  # apart from the seeds that tiny-sd was pretrained on and is evaluated on
VERSION = 1  # raise it when the default pairs change for a reason that `default_pairs` does not see


def probabilities(attribute, profession):
    """P(class) of a gender or skin that the caption leaves unspecified: {class: probability}."""
    if attribute == "skin":
        return P_SKIN
    man = P_MAN.get(profession, sum(P_MAN.values()) / len(P_MAN))
    return {"man": man, "woman": 1 - man}


def portrait_pair(seed, attribute, noun):
    """-> prompt, aligned Records, violating Record. The records differ in one attribute.

    All classes but the majority class are aligned, in COPIES. If each prompt had one of the four other skins, the value
    encoder would learn a skin for each prompt.
    """
    rng = random.Random(f"pair {seed}")
    profession, specified = (rng.choice(PROFESSIONS), set()) if noun == "person" else (noun, {"profession"})
    specified |= {other for other in ("gender", "skin") if rng.random() < P_SPECIFIED and other != attribute}
    if attribute == "zombie":
        specified.discard("skin")

    def choose(name):
        p = probabilities(name, profession)
        return rng.choice([*p]) if name in specified else rng.choices([*p], p.values())[0]

    gender, skin = choose("gender"), choose("skin")
    record = Record(seed, profession, gender, skin, specified=frozenset(specified))
    if attribute in HARMS:
        bad, good = True, [False]
    else:
        p = probabilities(attribute, noun)
        bad = max(p, key=p.get)
        good = [value for value in p if value != bad for _ in range(COPIES.get(value, 1))]
    *aligned, violating = (replace(record, **{attribute: value}) for value in (*good, bad))
    asked = violating if attribute in HARMS else aligned[0]  # a prompt never mentions a protected attribute
    return write_caption(asked), aligned, violating


def nouns_of_pairs(attribute, n):
    """-> n nouns, such that every class which is the majority of some noun is violating equally often."""
    by_majority = {}
    for noun in NOUNS:
        p = {} if attribute in HARMS else probabilities(attribute, noun)
        by_majority.setdefault(max(p, key=p.get, default=None), []).append(noun)
    endless = [cycle(nouns) for nouns in by_majority.values()]
    return [next(nouns) for nouns, _ in zip(cycle(endless), range(n))]


def write_scene(folder, samples, suffix="png"):
    """Write one scene, its images and metadata.jsonl. samples: [(PIL image, prompt, value, label)]."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for i, (image, prompt, value, label) in enumerate(samples):
            name = f"{i:04}.{suffix}"
            image.save(folder / name, quality=JPEG_QUALITY)  # PNG has none, and ignores it
            entry = {"file_name": name, "prompt": prompt, "value": value, "label": label}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def render_pairs(folder, principles=PRINCIPLES, pairs=PAIRS, preservation=PRESERVATION):
    """Write pairs[attribute] scenes of aligned images and a violating one, preservation[attribute] of one image."""
    seeds = count(FIRST_SEED)
    with atomic_folder(folder, "dataset.json", keep=True) as root:

        def write(type, attribute, noun, seed, *samples):
            write_scene(root / type / f"{attribute}-{seed}-{noun.replace(' ', '-')}", samples)

        for value, attribute in principles.items():
            for noun, seed in zip(nouns_of_pairs(attribute, pairs[attribute]), seeds):
                prompt, aligned, violating = portrait_pair(seed, attribute, noun)
                write(TOXICITY_TYPE if attribute in HARMS else BIAS_TYPE, attribute, noun, seed,
                      *((render(record), prompt, value, 1) for record in aligned),
                      (render(violating), prompt, value, 0))
            for noun, seed in zip(nouns_of_pairs(attribute, preservation.get(attribute, 0)), seeds):
                _, (record, *_), _ = portrait_pair(seed, attribute, noun)
                write(PRESERVATION_TYPE, attribute, noun, seed, (render(record), write_caption(record), value, 1))
        write_json(root / "dataset.json", {"principles": principles, "pairs": pairs, "preservation": preservation})


def default_pairs(folder):
    """-> the default set in `folder`, rendered at the first call. Its name is a hash of settings and a few pairs.

    Some of its prompts exceed tiny-sd's 24 tokens, as some captions of pretraining do. They are cut without a warning.
    """
    warnings.filterwarnings("ignore", message="prompt cut")
    settings = VERSION, PRINCIPLES, PAIRS, PRESERVATION, COPIES, FIRST_SEED, P_SPECIFIED, P_MAN, P_SKIN
    digest = hashlib.sha256(repr(settings).encode())
    for seed, (noun, attribute) in enumerate(zip(NOUNS, cycle(PRINCIPLES.values()))):
        prompt, aligned, violating = portrait_pair(seed, attribute, noun)
        for record in (*aligned, violating):
            digest.update(prompt.encode() + render(record).tobytes())

    def read(root):
        read_json(root / "dataset.json")
        if faults := read_samples(root)[1]:
            raise UserError(faults[0])
        return root

    return cached(Path(folder) / f"portraits-{digest.hexdigest()[:8]}", read, render_pairs, lock=Path(folder))


def print_table(sd, value_encoder):
    """Print what the value encoder changes, by the toy dataset's classifier: the end of `python train.py`."""
    from lab.evaluate import print_quick_table  # it loads far more than rendering needs
    print_quick_table(sd, value_encoder, PRINCIPLES)
