"""Preference data: (prompt, principle, aligned image y_w, violating image y_l), read, encoded once, and paired.

    dataset = PreferenceDataset(root, sd, cache)
    pair = dataset.pair(position, seed, timesteps)      # latents of y_w and y_l, eps and t: one row of a batch

The layout is that of the authors' release, ROOT/<type>/<scene>/metadata.jsonl beside the images, with a line for each:
{"file_name", "prompt", "value", "label"}. Label 1 is aligned, any other violating. Scenes of the type `preservation`
are ours: aligned images alone, of prompts that the principle has nothing to do with. There y_l is y_w, and the
principle should change nothing (`train.reference_errors`). `python -m lab.dataset` builds and checks such folders.
"""

import functools
import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, atomic_folder, read_json, regular
from latents import check_unusable, encode_samples, fingerprint, map_file, remove_leftovers, unique_prompts

PRESERVATION_TYPE = "preservation"
MAX_LENGTH = 10_000  # characters of a text in metadata.jsonl; the tokenizer keeps 77 words at most


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
    """A preference pair with all its randomness drawn."""

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
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"expected a text as {key}, got {entry[key]!r}")
        if len(entry[key]) > MAX_LENGTH:
            raise ValueError(f"expected at most {MAX_LENGTH} characters as {key}, got {len(entry[key])}")
        entry[key].encode()  # half of a surrogate pair is a ValueError
    if type(entry["label"]) is not int:  # isinstance would take True
        raise ValueError(f"expected an integer as label, got {entry['label']!r}")
    path = (scene / entry["file_name"]).resolve()
    if Path(entry["file_name"]).is_absolute() or not path.is_relative_to(root.resolve()):
        raise ValueError(f"{entry['file_name']} leaves the dataset folder")
    if not path.is_file():
        raise ValueError(f"there is no file {entry['file_name']}")
    sample = Sample(path, entry["prompt"], entry["value"], entry["label"] == 1, scene, where)
    if is_preservation(sample) and not sample.aligned:
        raise ValueError(f"expected only label 1 in scenes of type {PRESERVATION_TYPE}, got {entry['label']}")
    return sample


def read_lines(root):
    """Yield (line, scene folder, "file:number") of all metadata of a dataset folder. Raises UserError for none."""
    empty = True
    for file in sorted(root.glob("*/*/metadata.jsonl")):
        if file.parent.name.startswith("."):  # a scene that is being built
            continue
        try:
            lines = regular(file, "a file of samples").read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{file}: expected a file to read, got {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield line, file.parent, f"{file}:{number}"
    if empty:
        raise UserError(f"{root}: expected a dataset, <type>/<scene>/metadata.jsonl, got none")


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


def is_preservation(sample):
    return sample.scene.parent.name == PRESERVATION_TYPE


# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

class PreferenceDataset:
    """The pairs of a dataset folder. len() is the number of aligned images.

    key: a hash of the weights and of the data's content.

    The first use encodes all images and prompts into the folder `cache`/`key`, whose files are memory-mapped from then
    on. Unusable samples, and scenes without aligned or without violating images, are skipped with a warning.
    Raises UserError as `read_samples` does.
    """

    def __init__(self, root, sd, cache):
        samples, faults = read_samples(root)
        self.key = fingerprint(sd, samples, Path(root).resolve())
        total, prompts = len(samples) + len(faults), unique_prompts(samples)

        def make(folder):
            remove_leftovers(folder)
            with atomic_folder(folder, "broken.json", keep=True) as temporary:
                encode_samples(sd, samples, faults, root, temporary)

        def read(folder):
            broken = {int(i): fault for i, fault in read_json(folder / "broken.json").items()}
            channels, size = sd.unet.config.in_channels, sd.unet.config.sample_size
            # sample, plain or mirrored, mean or log-variance
            shape = (len(samples) - len(broken), 2, 2, channels, size, size)
            latents = map_file(folder / "latents.bin", shape, torch.float16)
            shape = (len(prompts), sd.tokenizer.max_length, sd.text_encoder.config.hidden_size)
            embeds = map_file(folder / "prompts.bin", shape, next(sd.text_encoder.parameters()).dtype)
            return {i: f"{samples[i].where}: {fault}" for i, fault in broken.items()}, latents, embeds

        from formats.disk import cached  # here, so that importing the core loads nothing of formats/
        broken, self.latents, self.prompt_embeds = cached(Path(cache) / self.key, read, make, Path(root))
        faults += broken.values()
        samples = [sample for i, sample in enumerate(samples) if i not in broken]
        self.aligned, self.violating = pair_up(samples, faults)
        for fault in faults:
            warnings.warn(f"{fault}; skipped")
        check_unusable(faults, total, root)

        self.prompt_rows = {prompt: row for row, prompt in enumerate(prompts)}

    def __len__(self):
        return len(self.aligned)

    def aligned_at(self, position, seed):
        """-> the aligned Sample at a position of the run, and its row of latents."""
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
        violating, row_l = rng.choice(self.violating.get(aligned.scene) or [(aligned, row_w)])
        mirrored = rng.randrange(2)  # both or neither; the authors flip each image by itself
        z_w, z_l = (sample_latent(*self.latents[row, mirrored].float(), generator) for row in (row_w, row_l))
        return Pair(aligned.prompt, aligned.value, self.prompt_embeds[self.prompt_rows[aligned.prompt]], z_w, z_l,
                    eps=torch.randn(z_w.shape, generator=generator), t=rng.choice(timesteps),
                    preservation=is_preservation(aligned), where=f"{aligned.where} and {violating.where}")


def pair_up(samples, faults):
    """-> [(aligned Sample, its row of latents)], {scene: [(violating Sample, its row)]}. Adds lonely samples to `faults`."""
    aligned, violating = [], {}
    have_aligned = {sample.scene for sample in samples if sample.aligned}
    have_violating = {sample.scene for sample in samples if not sample.aligned or is_preservation(sample)}
    for row, sample in enumerate(samples):
        if sample.scene not in have_aligned & have_violating:
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
