"""What the eye sees and the classifier does not: how far LiVO's images are from what they should be.

    python -m lab.twins                                   # tiny-sd/value_encoder: a table, out/twins.png
    python -m lab.twins --value-encoder runs/livo

The *twin* of LiVO's image is the base model's image from the same noise, whose prompt does not ask for the toxicity, or
names the gender or skin that LiVO's image shows. Their distance is given as a fraction of that of two twins of
different noise, in pixels and in tiny-clip's image space: 0 is the same image, 1 another person. Beside it, the images
that a detector of blotches calls damaged (damage.py).
"""

from pathlib import Path

import numpy as np

from common import Parser, atomic, number, run
from formats.disk import check_writable
from lab import portraits
from lab.captions import WORDINGS, with_article
from lab.classifier import ATTRIBUTES, load_classifier
from lab.clip_image import load_clip
from lab.damage import load_detector
from lab.evaluate import TINY_CLIP, add_toy_model, generate_each, load_toy_model, pixel_distance, prompts_about
from lab.metrics import percent
from lab.toy import PRINCIPLES
from runs import SAMPLING
from sample import captioned

OTHER_NOISE = 10**4  # added to the seeds


def twin_prompts(attribute, professions, shown, opening="a portrait of "):
    """shown: the class indices of the attribute in LiVO's images."""
    words = [""] * len(professions) if attribute in portraits.HARMS else [
        WORDINGS[ATTRIBUTES[attribute][i]][0] + " " for i in shown]
    return [opening + with_article(word + profession) for word, profession in zip(words, professions)]


def distances(images, others, clip):
    """Mean over N image pairs -> absolute pixel difference, 1 − cosine."""
    cosines = (clip.image_features(images) * clip.image_features(others)).sum(1)  # (N,)
    return np.array([pixel_distance(images, others).mean(), 1 - cosines.mean().item()])


def measure_principle(sd, value_encoder, principle, attribute, n, classifier, detector, clip):
    """-> a row of the table, and the images of the first seed: base model, LiVO, twin."""
    professions = [profession for profession in portraits.PROFESSIONS for _ in range(n)]
    seeds, prompts = range(len(professions)), prompts_about(attribute, professions)
    base = generate_each(sd, SAMPLING, [(prompt, "") for prompt in prompts], seeds)
    livo = generate_each(sd, SAMPLING | {"fraction": 1}, [(prompt, "") for prompt in prompts], seeds, [principle],
                         value_encoder)
    twins = twin_prompts(attribute, professions, classifier.classify(livo)[attribute])
    twin, other = (generate_each(sd, SAMPLING, [(prompt, "") for prompt in twins], [seed + offset for seed in seeds])
                   for offset in (0, OTHER_NOISE))
    damaged = [percent(detector.is_damaged(images)) for images in (livo, twin)]
    return [*distances(livo, twin, clip) / distances(twin, other, clip), *damaged], [base[::n], livo[::n], twin[::n]]


def main(argv=None):
    parser = Parser(description="Distance of LiVO's images to those of a prompt without the toxicity.")
    add_toy_model(parser)
    parser.add_argument("-n", type=number(int, 1, 1000), default=4, help="images per principle and profession")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of twins.png")
    args = parser.parse_args(argv)
    check_writable(args.out)
    sd, value_encoder = load_toy_model(args)
    classifier, detector, clip = load_classifier(), load_detector(), load_clip(TINY_CLIP)
    print(f"{'':34}{'distance to twin':>22}{'damaged, percent':>22}")
    print(" " * 34 + "".join(f"{column:>11}" for column in ("pixels", "tiny-clip", "LiVO", "twin")))
    rows = []
    for principle, attribute in PRINCIPLES.items():
        values, images = measure_principle(sd, value_encoder, principle, attribute, args.n, classifier, detector, clip)
        print(f"{principle:34}" + "".join(f"{value:11.2f}" for value in values), flush=True)
        rows += [(f"{principle}: {name}", some) for name, some in zip(("base model", "LiVO", "twin"), images)]
    with atomic(args.out / "twins.png") as path:
        captioned(rows).save(path, "PNG")
    print(f"images of each in {args.out / 'twins.png'}")


if __name__ == "__main__":
    run(main)
