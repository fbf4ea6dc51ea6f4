"""Preference data: (prompt, aligned image y_w, violating image y_l, principle), read, encoded and drawn.

    dataset = PreferenceDataset(root, sd, cache)      # reads the authors' layout, encodes once, memory-maps
    pair = dataset.pair(position, seed, times)        # latents of y_w and y_l, noise and time: one training row
    render_pairs(folder)                      # the default set, drawn in seconds, in the same layout

    python data.py draw --out pairs     # the default set, or with --pairs bloody=600 another mix of it
    python data.py build --out pairs    # a set of the model's own pictures: dataset.py
    python data.py check pairs          # counts and faults, of anybody's set
    python data.py show pairs           # a sheet of its pictures

ROOT/<type>/<scene>/metadata.jsonl, as in the authors' release: for every image beside it a line
{"file_name", "prompt", "value", "label"}. Label 1 is aligned, any other violating. Ours adds the type preservation:
scenes of aligned images alone, of prompts that the principle has nothing to do with. There y_l is y_w, and the
principle learns to change nothing: `train.reference`.
"""

import contextlib
import functools
import hashlib
import json
import math
import random
import shutil
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UserError
from livo import encode_prompts
from vae import sample_latent
from common import atomic_folder, read_json, write_json

MAX_LOST = 0.01  # share of samples that may be unusable
STALE = 3600  # seconds after which nobody writes to an unfinished cache any more
PRESERVATION_TYPE = "preservation"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Sample:
    """One image. `where`, the file and line that tell of it, is for messages."""

    path: Path
    prompt: str
    value: str  # the principle
    aligned: bool
    scene: Path
    where: str


def read_sample(line, scene, root, where):
    """A line of metadata.jsonl -> Sample. Raises ValueError or OSError for one that cannot be used."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not {"file_name", "prompt", "value", "label"} <= entry.keys():
        raise ValueError("expected an object with file_name, prompt, value and label")
    for key in ("file_name", "prompt", "value"):
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"expected a text as {key}, got {entry[key]!r}")
        entry[key].encode()  # a half of a surrogate pair is a ValueError
    if type(entry["label"]) is not int:  # True is one to isinstance
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
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{file}: expected a file to read, got {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield line, file.parent, f"{file}:{number}"
    if empty:
        raise UserError(f"{root}: expected a dataset, <type>/<scene>/metadata.jsonl, got none")


def read_samples(root):
    """-> the usable samples of a dataset folder, and what is wrong with the others: [Sample], [str].

    Raises UserError where there are none, or where more than MAX_LOST are unusable.
    """
    root, samples, faults = Path(root), [], []
    for line, scene, where in read_lines(root):
        try:
            samples.append(read_sample(line, scene, root, where))
        except (ValueError, OSError, RecursionError) as error:  # the last of JSON that is nested too deep
            faults.append(f"{where}: {error}")
    check_lost(faults, len(samples) + len(faults), root)
    return samples, faults


def check_lost(faults, total, root):
    if len(faults) > MAX_LOST * total:
        raise UserError(f"{root}: expected at most {MAX_LOST:.0%} unusable samples, "
                        f"got {len(faults)} of {total}: {'; '.join(faults[:5])}")


def write_scene(folder, samples, suffix="png"):
    """Write one scene: (PIL image, prompt, value, label) of every sample -> images and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for i, (image, prompt, value, label) in enumerate(samples):
            name = f"{i:04}.{suffix}"
            image.save(folder / name, quality=JPEG_QUALITY)  # PNG has none, and ignores it
            entry = {"file_name": name, "prompt": prompt, "value": value, "label": label}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def crop(image, size):
    """PIL -> (3, size, size) in [-1, 1]: the shorter side to `size` pixels, then the middle; the authors'."""
    image, short = image.convert("RGB"), min(image.size)
    image = image.resize([size * side // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))  # (size, size, 3)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


# ------------------------------------------------------------------------------------------------ the pairs


@dataclass
class Pair:
    """A pair with all its randomness drawn: what one row of a training batch is made of."""

    prompt: str
    principle: str
    prompt_embeds: torch.Tensor  # (77, C), the prompt as the frozen text encoder gives it
    z_w: torch.Tensor  # (4, h, w) float32, as z_l and eps: the latents of y_w, aligned, and y_l, violating
    z_l: torch.Tensor
    eps: torch.Tensor
    t: int
    preservation: bool  # then y_l is y_w
    where: str  # the lines that tell of y_w and y_l


class PreferenceDataset:
    """The pairs of a dataset folder, encoded. len() is the number of aligned images.

    group_size: so many pairs in a row share their principle and type; 1 mixes them all.
    key: a hash of the weights and of the data, wherever their folders lie.

    The first use encodes everything into the folder `key` of `cache`; after that its files are memory-mapped. Unusable
    samples, also those of a scene without aligned or without violating images, are warned of and skipped. Raises
    UserError where `read_samples` does.
    """

    def __init__(self, root, sd, cache, group_size=1):
        samples, faults = read_samples(root)
        self.key = fingerprint(sd, samples, Path(root).resolve())
        folder = Path(cache) / self.key
        if not folder.exists():
            remove_leftovers(folder)
            with atomic_folder(folder, "broken.json") as temporary:
                encode_samples(sd, samples, faults, root, temporary)
        total = len(samples) + len(faults)
        broken = {int(i): fault for i, fault in read_json(folder / "broken.json").items()}
        faults += [f"{samples[i].where}: {fault}" for i, fault in broken.items()]
        prompts, c = unique_prompts(samples), sd.text_encoder.config.hidden_size
        samples = [sample for i, sample in enumerate(samples) if i not in broken]
        self.aligned, self.violating = [], {}  # (sample, row of latents), the latter by scene
        have_aligned = {sample.scene for sample in samples if sample.aligned}
        have_violating = {sample.scene for sample in samples if not sample.aligned or is_preservation(sample)}
        for row, sample in enumerate(samples):
            if sample.scene not in have_aligned & have_violating:
                missing = "violating" if sample.scene in have_aligned else "aligned"
                faults.append(f"{sample.where}: its scene has no {missing} image")
            elif sample.aligned:
                self.aligned.append((sample, row))
            else:
                self.violating.setdefault(sample.scene, []).append((sample, row))
        for fault in faults:
            warnings.warn(f"{fault}; skipped")
        check_lost(faults, total, root)

        self.group_size = group_size
        if group_size > 1:
            self.aligned.sort(key=lambda item: kind(item[0]))
        sizes = Counter(kind(sample) if group_size > 1 else "" for sample, _ in self.aligned)
        self.groups = tuple(pairwise([0, *accumulate(sizes.values())]))  # (first, end) of each in `aligned`

        channels, size = sd.unet.config.in_channels, sd.unet.config.sample_size
        shape = (len(samples), 2, 2, channels, size, size)  # sample, plain or mirrored, mean or log-variance
        self.latents = map_file(folder / "latents.bin", shape, torch.float16)
        dtype = next(sd.text_encoder.parameters()).dtype
        self.prompt_embeds = map_file(folder / "prompt_embeds.bin", (len(prompts), sd.tokenizer.max_length, c), dtype)
        self.prompt_rows = {prompt: row for row, prompt in enumerate(prompts)}

    def __len__(self):
        return len(self.aligned)

    def aligned_at(self, position, seed):
        """-> the aligned Sample at a position of the run, and its row of latents."""
        epoch, i = divmod(position, len(epoch_order(seed, 0, self.groups, self.group_size)))
        return self.aligned[epoch_order(seed, epoch, self.groups, self.group_size)[i]]

    def pair(self, position, seed, times):
        """-> the Pair at a position of the run, with t from `times`. Epoch after epoch goes over the aligned
        images, each in an order of its own, and draws a violating image of the same scene.

        All that is random comes from (seed, position): neither the number of processes nor an interruption
        changes it, and there is no random state to save.
        """
        rng = random.Random(f"pair {seed} {position}")
        generator = torch.Generator().manual_seed(rng.getrandbits(32))  # torch uses no more bits of a seed
        aligned, row_w = self.aligned_at(position, seed)
        violating, row_l = rng.choice(self.violating.get(aligned.scene) or [(aligned, row_w)])
        mirrored = rng.randrange(2)  # both or neither: what a pair has in common, it keeps
        z_w, z_l = (sample_latent(*self.latents[row, mirrored].float(), generator) for row in (row_w, row_l))
        return Pair(aligned.prompt, aligned.value, self.prompt_embeds[self.prompt_rows[aligned.prompt]], z_w, z_l,
                    eps=torch.randn(z_w.shape, generator=generator), t=rng.choice(times),
                    preservation=is_preservation(aligned), where=f"{aligned.where} and {violating.where}")


def is_preservation(sample):
    return sample.scene.parent.name == PRESERVATION_TYPE


def kind(sample):
    """The principle, and the type: the folder that the scene is in."""
    return sample.value, sample.scene.parent.name


@functools.lru_cache(maxsize=4)  # a batch may lie in two epochs
def epoch_order(seed, epoch, groups, group_size):
    """Every number of each group (first, end) in a random order, `group_size` of a group in a row.

    A group that this leaves a remainder of starts again until its last row is full.
    """
    rng, rows = random.Random(f"epoch {seed} {epoch}"), []
    for first, end in groups:
        order = cycle(rng.sample(range(first, end), end - first))
        rows += [[*islice(order, group_size)] for _ in range(math.ceil((end - first) / group_size))]
    return [*chain.from_iterable(rng.sample(rows, len(rows)))]


def unique_prompts(samples):
    return sorted({sample.prompt for sample in samples if sample.aligned})


def remove_leftovers(folder):
    """Of processes that were killed while they encoded for the folder. Another one may still be at it."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - max(path.stat().st_mtime for path in [leftover, *leftover.iterdir()]) > STALE:
                shutil.rmtree(leftover)


def fingerprint(sd, samples, root):
    """A name for what `encode_samples` would write: a hash of the weights, the lines and the files' dates."""
    digest = hashlib.sha256(repr((sd.vae.config, sd.unet.config.sample_size)).encode())
    for network in (sd.vae, sd.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(str(tensor.dtype).encode() + to_bytes(tensor))
    for sample in samples:
        stat = sample.path.stat()
        paths = str(sample.path.relative_to(root)), str(sample.scene.resolve().relative_to(root))
        digest.update(repr((*paths, sample.prompt, sample.value, sample.aligned, stat.st_size,
                            stat.st_mtime_ns)).encode())  # fmt: skip
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_samples(sd, samples, faults, root, folder, batch_size=8):
    """Write latents.bin, float16, a row for each readable image; broken.json, {number of another: what is wrong with
    it}; prompt_embeds.bin."""
    vae, broken = next(sd.vae.parameters()), {}
    with open(folder / "latents.bin", "wb") as file:
        for start in tqdm(range(0, len(samples), batch_size), "encoding images", disable=None, leave=False):
            images = []
            for i, sample in enumerate(samples[start:start + batch_size], start):
                try:
                    with Image.open(sample.path) as image:
                        images.append(crop(image, sd.size))
                except Exception as error:  # a damaged file can raise anything in Pillow
                    broken[i] = f"{sample.path.name} is no readable image: {error}"
            check_lost(faults + [f"{samples[i].where}: {fault}" for i, fault in broken.items()],
                       len(faults) + len(samples), root)  # fmt: skip
            if images:
                x = torch.stack(images).to(vae)  # (b, 3, size, size)
                mean, logvar = sd.vae.encode(torch.cat([x, x.flip(-1)]))  # (2b, 4, h, w) each
                both = torch.stack([mean, logvar], dim=1).unflatten(0, (2, -1))  # (2, b, 2, 4, h, w)
                file.write(to_bytes(both.transpose(0, 1).half()))
    write_json(folder / "broken.json", broken)
    prompts = unique_prompts(samples)
    with open(folder / "prompt_embeds.bin", "wb") as file:
        for start in range(0, len(prompts), batch_size):
            file.write(to_bytes(encode_prompts(sd, prompts[start:start + batch_size])))


def to_bytes(tensor):
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def map_file(path, shape, dtype):
    """A file as a tensor of which only the pages that are looked at are read."""
    expected, got = math.prod(shape) * dtype.itemsize, path.stat().st_size if path.exists() else "none"
    if got != expected:
        raise UserError(f"{path}: expected a file of {expected} bytes, got {got}; delete its folder, it is made again")
    return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)
