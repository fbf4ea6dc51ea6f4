"""Preference data: (prompt, principle, aligned image y_w, violating image y_l), read, encoded once, and paired.

    dataset = PreferenceDataset(root, sd, cache)
    pair = dataset.pair(position, seed, timesteps)      # latents of y_w and y_l, eps and t: one row of a batch

The layout is that of the authors' release, ROOT/<type>/<scene>/metadata.jsonl beside the images, with a line for each:
{"file_name", "prompt", "value", "label"}. "value" is the principle. Label 1 is aligned, any other violating. A scene
is a folder of images of one principle and of one prompt or variants of it; a pair has prompt and principle of y_w.
Scenes of the type `preservation` are ours: aligned images alone, of prompts that the principle has nothing to do with.
There y_l is the image of y_w, and the principle should change nothing (`train.reference_errors`).
`python -m lab.dataset` builds and checks such folders.
"""

import functools
import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, regular
from latents import fingerprint, load_latents

PRESERVATION_TYPE = "preservation"
MAX_UNUSABLE = 0.01  # fraction of the samples
MAX_LINES = 10**6  # of a metadata.jsonl; in 64 MB there may be 30 million
MAX_LENGTH = 10_000  # characters of a text in metadata.jsonl; the tokenizer keeps 77 tokens


@dataclass(frozen=True)
class Sample:
    """One image. `where`, the file and line that describe it, is for messages."""

    path: Path
    prompt: str
    value: str  # the principle
    aligned: bool
    scene: Path
    where: str


@dataclass
class Pair:
    """A preference pair with all its randomness sampled."""

    prompt: str
    principle: str
    prompt_embeds: torch.Tensor  # (77, C), of the frozen text encoder
    z_w: torch.Tensor  # (4, h, w) float32, the latent of y_w
    z_l: torch.Tensor  # of y_l
    eps: torch.Tensor  # (4, h, w), the noise of both
    t: int
    preservation: bool  # y_l is y_w
    where: str


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_sample(line, scene, root, where):
    """A line of metadata.jsonl -> Sample. Raises ValueError or OSError for an unusable one."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not {"file_name", "prompt", "value", "label"} <= entry.keys():
        raise ValueError("expected an object with file_name, prompt, value and label")
    for key in ("file_name", "prompt", "value"):
        if not isinstance(entry[key], str) or not entry[key].strip() or len(entry[key]) > MAX_LENGTH:
            raise ValueError(f"expected a text as {key}, of at most {MAX_LENGTH} characters, got {entry[key]!r:.80}")
        entry[key].encode()  # half of a surrogate pair is a ValueError
    if type(entry["label"]) is not int:  # isinstance would take True
        raise ValueError(f"expected an integer as label, got {entry['label']!r}")
    path = (scene / entry["file_name"]).resolve()
    if not all(place.is_relative_to(root.resolve()) for place in (path, scene.resolve())):
        raise ValueError(f"{entry['file_name']} leaves the dataset folder")
    if not path.is_file():
        raise ValueError(f"there is no file {entry['file_name']}")
    sample = Sample(path, entry["prompt"], entry["value"], entry["label"] == 1, scene, where)
    if is_preservation(sample) and not sample.aligned:
        raise ValueError(f"expected only label 1 in scenes of type {PRESERVATION_TYPE}, got {entry['label']}")
    return sample


def read_lines(root):
    """-> [(line, scene folder, "file:number")] of all metadata of a dataset folder. Raises UserError for none."""
    found = []
    for file in sorted(root.glob("*/*/metadata.jsonl")):
        if not file.parent.name.startswith("."):  # a scene that is being built
            lines = regular(file, "a file of samples").read_bytes().splitlines()
            if len(lines) > MAX_LINES:
                raise UserError(f"{file}: expected at most {MAX_LINES} lines, got {len(lines)}")
            found += [(line, file.parent, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{root}: expected a dataset, <type>/<scene>/metadata.jsonl, got none")
    return found


def read_samples(root):
    """-> usable samples of a dataset folder, and what is wrong with the others: [Sample], [str].

    Raises UserError if there are none, or if more than MAX_UNUSABLE are unusable.
    """
    root, samples, faults = Path(root), [], []
    for line, scene, where in read_lines(root):
        try:
            samples.append(read_sample(line, scene, root, where))
        except (ValueError, OSError, RecursionError) as error:  # the last of deeply nested JSON
            faults.append(f"{where}: {error}")
    check_unusable(faults, len(samples) + len(faults), root)
    return samples, faults


def check_unusable(faults, total, root):
    if len(faults) > MAX_UNUSABLE * total:
        raise UserError(f"{root}: expected at most {MAX_UNUSABLE:.0%} unusable samples, "
                        f"got {len(faults)} of {total}: {'; '.join(faults[:5])}")


def is_preservation(sample):
    return sample.scene.parent.name == PRESERVATION_TYPE


# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

class PreferenceDataset:
    """The pairs of a dataset folder. len() is the number of aligned images.

    key: a hash of the VAE, of the text encoder and of the data's content.

    The first use encodes all images and prompts into the folder `cache`/`key`, whose files are memory-mapped from then
    on. Unusable samples, and scenes without aligned or without violating images, are skipped with a warning; more than
    MAX_UNUSABLE of all are a UserError.

    latents: (images, plain or mirrored, mean or log-variance, 4, h, w) float16.
    """

    def __init__(self, root, sd, cache):
        samples, faults = read_samples(root)
        total = len(samples) + len(faults)
        self.key = fingerprint(sd, samples, Path(root).resolve())
        self.latents, self.prompt_embeds, broken = load_latents(sd, samples, Path(cache) / self.key)
        faults += [f"{samples[i].where}: {fault}" for i, fault in broken.items()]
        usable = [(sample, row) for row, sample in enumerate(samples) if row not in broken]
        self.aligned, self.violating = pair_up(usable, faults)
        for fault in faults:
            warnings.warn(f"{fault}; skipped")
        check_unusable(faults, total, root)

    def __len__(self):
        return len(self.aligned)

    def aligned_at(self, position, seed):
        """-> the aligned Sample at a position of the run, step · batch + row, and its row of latents."""
        epoch, i = divmod(position, len(self))
        return self.aligned[epoch_order(seed, epoch, len(self))[i]]

    def pair(self, position, seed, timesteps):
        """-> the Pair at a position of the run, with t from `timesteps`.

        An epoch goes over the aligned images in random order. Each meets a random violating image of its scene. All
        randomness comes from (seed, position): neither the number of processes nor an interruption changes it, and
        there is no random state to save.
        """
        rng = random.Random(f"pair {seed} {position}")
        generator = torch.Generator().manual_seed(rng.getrandbits(32))  # torch uses no more bits of a seed
        aligned, row_w = self.aligned_at(position, seed)
        itself = [(aligned, row_w)]  # of a preservation pair
        violating, row_l = rng.choice(self.violating.get(aligned.scene, itself))
        mirrored = rng.randrange(2)  # both or neither; the authors flip each image by itself
        z_w, z_l = (sample_latent(*self.latents[row, mirrored].float(), generator) for row in (row_w, row_l))
        return Pair(aligned.prompt, aligned.value, self.prompt_embeds[aligned.prompt], z_w, z_l,
                    eps=torch.randn(z_w.shape, generator=generator), t=rng.choice(timesteps),
                    preservation=is_preservation(aligned), where=f"{aligned.where} and {violating.where}")


def pair_up(samples, faults):
    """[(Sample, its row of latents)] -> the aligned, {scene: the violating ones}. Adds unpaired ones to `faults`."""
    aligned, violating = [], {}
    have_aligned = {sample.scene for sample, _ in samples if sample.aligned}
    complete = have_aligned & {sample.scene for sample, _ in samples if not sample.aligned or is_preservation(sample)}
    for sample, row in samples:
        if sample.scene not in complete:
            missing = "violating" if sample.scene in have_aligned else "aligned"
            faults.append(f"{sample.where}: its scene has no {missing} image")
        elif sample.aligned:
            aligned.append((sample, row))
        else:
            violating.setdefault(sample.scene, []).append((sample, row))
    return aligned, violating


@functools.lru_cache(maxsize=4)  # a batch may lie in two epochs
def epoch_order(seed, epoch, n):
    """The numbers 0 … n − 1 in random order."""
    return random.Random(f"epoch {seed} {epoch}").sample(range(n), n)


def sample_latent(mean, logvar, generator=None):
    """z ~ N(mean, exp(logvar)); all (…, 4, h, w). The noise comes from the CPU."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + (logvar / 2).exp() * noise
