"""What the eye sees and the classifier of attributes does not: damaged images, and how far LiVO's are from their twins.

    python -m lab.damage                                   # tiny-sd/value_encoder: a table, out/twins.png
    python -m lab.damage --value-encoder runs/livo
    detector.classify(images)["damaged"]                   # probabilities (N,) of load_detector()

The *twin* of LiVO's image is the base model's image from the same noise, whose prompt does not ask for the toxicity, or
names the gender or skin that LiVO's image shows. Their distance is given as a fraction of that of two twins of different
noise, in pixels and in tiny-clip's image space: 0 is the same image, 1 another person.

The detector is a small network, trained in half a minute to tell rendered portraits from the same with blotches and
dots. Compare its percentage for LiVO's images with that for the base model's: generated images are a little blurred.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import weights
from common import Parser, UserError, atomic, number, run
from lab import portraits
from lab.captions import WORDINGS, with_article
from lab.classifier import ATTRIBUTES, TRAINING, Classifier, augment, digest, load_classifier, uniform_record
from lab.clip_image import load_clip
from lab.metrics import percent
from lab.portraits import stack, to_float
from lab.toy import PRINCIPLES
from livo import load_value_encoder
from runs import SAMPLING
from sample import captioned, generate

ROOT = Path(__file__).parent.parent
OTHER_NOISE = 10**4  # added to the seeds
DAMAGE = {"damaged": (False, True)}
COLOURS = ((0.95, 0.9, 0.85), (0.1, 0.08, 0.08), (0.75, 0.05, 0.1), (0.5, 0.5, 0.5))  # of blotches, in [0, 1]
MOST, RADII, EDGE = 4, (1.2, 4.0), 1.0  # blotches in an image; pixels
STRENGTH = (0.5, 1.0)  # opacity
VERSION = 1  # raise it when the trained detector changes for a reason that `load_detector` does not see


def damage(x):
    """Add up to MOST blotches to images (B, 3, H, W) in [-1, 1], most of them on the person."""
    size, uniform = x.shape[-1], lambda low, high: low + (high - low) * torch.rand(len(x), 1, 1)
    row, column = torch.arange(size)[:, None], torch.arange(size)
    for i in range(MOST):
        x0, y0 = uniform(0.2, 0.8) * size, uniform(0.2, 0.95) * size  # (B, 1, 1)
        rx, ry = uniform(*RADII), uniform(*RADII)
        distance = (((column - x0) / rx) ** 2 + ((row - y0) / ry) ** 2).sqrt()  # (B, H, W), 1 at the edge
        opacity = torch.sigmoid((1 - distance) * torch.minimum(rx, ry) * 2 / EDGE) * uniform(*STRENGTH)
        there = i < torch.randint(1, MOST + 1, (len(x), 1, 1))
        colour = torch.tensor(COLOURS)[torch.randint(len(COLOURS), (len(x),))] + 0.2 * (torch.rand(len(x), 3) - 0.5)
        x = torch.lerp(x, 2 * colour[:, :, None, None] - 1, (opacity * there)[:, None])
    return x.clamp(-1, 1)


def train_detector(images, epochs, batch=TRAINING["batch"], learning_rate=TRAINING["learning_rate"]):
    """Train on rendered portraits, half of them damaged. Blood is on some of either half, so it is no damage."""
    records = [uniform_record(seed) for seed in range(images)]
    pixels = stack(map(portraits.render, tqdm(records, "rendering", disable=None)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector, order = Classifier(DAMAGE), torch.cat([torch.randperm(images) for _ in range(epochs)]).split(batch)
        optimizer = torch.optim.AdamW(detector.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, len(order))
        for rows in tqdm(order, "training the detector", disable=None):
            x, damaged = to_float(pixels[rows]), torch.rand(len(rows)) < 0.5
            x = torch.where(damaged[:, None, None, None], damage(x), x)
            loss = F.cross_entropy(detector(augment(x))[0]["damaged"], damaged.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return detector.eval()


def load_detector(folder=ROOT / "runs"):
    """The detector: from `folder`, or else trained and written there."""
    settings = str((VERSION, TRAINING, COLOURS, MOST, RADII, EDGE, STRENGTH))
    detector, file = Classifier(DAMAGE).eval(), folder / f"detector-{digest([settings])}.pt"
    if not file.exists():
        with atomic(file) as path:
            torch.save(train_detector(TRAINING["images"], TRAINING["epochs"]).state_dict(), path)
    detector.load_state_dict(torch.load(file, weights_only=True))
    return detector


# ── Twins ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def generate_all(sd, prompts, seeds, principle=None, value_encoder=None):
    """One image for each prompt and seed, with the principle in all of them -> N PIL images."""
    return [image for prompt, seed in zip(prompts, seeds)
            for _, image, _ in generate(sd, prompt, "", [principle] if principle else [], value_encoder, [seed],
                                        fraction=1, **SAMPLING)]


def twin_prompts(attribute, professions, shown):
    """shown: the class indices of the attribute in LiVO's images."""
    words = [""] * len(professions) if attribute in portraits.HARMS else [
        WORDINGS[ATTRIBUTES[attribute][i]][0] + " " for i in shown]
    return [f"a portrait of {with_article(word + profession)}" for word, profession in zip(words, professions)]


def distances(images, others, clip):
    """Mean over N image pairs -> absolute pixel difference, 1 − cosine."""
    a, b = (stack(some).float() for some in (images, others))  # (N, 3, H, W)
    cosines = (clip.image_features(images) * clip.image_features(others)).sum(1)  # (N,)
    return np.array([(a - b).abs().mean().item(), 1 - cosines.mean().item()])


def measure_principle(sd, value_encoder, principle, attribute, n, classifier, detector, clip):
    """-> a row of the table, and the images of the first seed: base model, LiVO, twin."""
    professions = [profession for profession in portraits.PROFESSIONS for _ in range(n)]
    seeds, harm = range(len(professions)), attribute + " " if attribute in portraits.HARMS else ""
    prompts = [f"a portrait of {with_article(harm + profession)}" for profession in professions]
    base = generate_all(sd, prompts, seeds)
    livo = generate_all(sd, prompts, seeds, principle, value_encoder)
    twins = twin_prompts(attribute, professions, classifier.classify(livo)[attribute])
    twin, other = (generate_all(sd, twins, [seed + offset for seed in seeds]) for offset in (0, OTHER_NOISE))
    damaged = [percent(detector.classify(images)["damaged"].numpy() > 0.5) for images in (base, livo, twin)]
    return [*distances(livo, twin, clip) / distances(twin, other, clip), *damaged], [base[::n], livo[::n], twin[::n]]


def main(argv=None):
    parser = Parser(description="Distance of LiVO's images to those of a plain prompt, and damaged images.")
    parser.add_argument("--weights", default=str(ROOT / "tiny-sd"), help="folder of a model of the toy dataset")
    parser.add_argument("--value-encoder", help="folder; by default the value_encoder/ in the folder of the weights")
    parser.add_argument("-n", type=number(int, 1, 1000), default=4, help="images per principle and profession")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of twins.png")
    args = parser.parse_args(argv)
    sd = weights.load(args.weights)
    value_encoder = load_value_encoder(args.value_encoder, args.weights, sd)
    if value_encoder is None or sd.size != portraits.SIZE:
        raise UserError(f"{args.weights}: expected a model of the toy dataset with a value encoder, got none")
    classifier, detector, clip = load_classifier(), load_detector(), load_clip(ROOT / "tiny-clip")
    columns = "pixels", "tiny-clip", "base", "LiVO", "twin"
    print(f"{'':34}  distance to twin     damaged, percent")
    print(f"{'':34}" + "".join(f"{name:>11}" for name in columns))
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
