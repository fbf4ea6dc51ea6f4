"""The cache of a dataset: latents of all images and embeddings of all prompts, encoded once and memory-mapped."""

import contextlib
import hashlib
import math
import shutil
import time

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, write_json
from livo import encode_prompts

MAX_UNUSABLE = 0.01  # fraction of the samples
MAX_PIXELS = 2**26  # of an image: a small file may hold more than the memory
MAX_RATIO = 32  # of an image's sides: more of a strip would not be seen, but fill the memory
STALE = 3600  # seconds after which an unfinished cache is abandoned
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"
WHITE = {"I": (2**16 - 1, 2**31, 2**32), "F": (1, 2**8 - 1, 2**16 - 1, math.inf)}  # values of white, by Pillow's mode


def open_image(path):
    """An image file as a viewer shows it -> PIL, RGB. Raises whatever Pillow raises for a damaged file.

    EXIF orientation is applied, transparency is composited on white, more than 8 bits are scaled to 8. Only FORMATS are
    tried, because Pillow would start Ghostscript for an EPS file.
    """
    with Image.open(path, formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width} × {image.height}")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16-bit greys, 32-bit integers, floats
            pixels = np.asarray(image)  # Pillow makes signed integers of unsigned ones
            pixels = np.nan_to_num((pixels.view(np.uint32) if image.mode == "I" else pixels).astype(np.float32))
            white = next(top for top in WHITE[image.mode[0]] if pixels.max() <= top)
            image = Image.fromarray((pixels / white * 255).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def crop(image, size):
    """PIL, RGB -> (3, size, size) in [-1, 1]: the shorter side resized to `size`, then the center crop, as the authors do."""
    short = min(image.size)
    image = ImageOps.fit(image, [min(side, MAX_RATIO * short) for side in image.size])  # only a long strip changes
    image = image.resize([size * side // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))  # (size, size, 3)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def check_unusable(faults, total, root):
    if len(faults) > MAX_UNUSABLE * total:
        raise UserError(f"{root}: expected at most {MAX_UNUSABLE:.0%} unusable samples, "
                        f"got {len(faults)} of {total}: {'; '.join(faults[:5])}")


def unique_prompts(samples):
    return sorted({sample.prompt for sample in samples if sample.aligned})


def remove_leftovers(folder):
    """Remove caches that killed processes left unfinished, but none that a living one may still write to."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - max(path.stat().st_mtime for path in [leftover, *leftover.iterdir()]) > STALE:
                shutil.rmtree(leftover)


def fingerprint(sd, samples, root):
    """The key of what `encode_samples` writes: a hash of the networks, the metadata and the content of the images."""
    digest = hashlib.sha256(repr((sd.vae.config, sd.unet.config.sample_size)).encode())
    for network in (sd.vae, sd.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(str(tensor.dtype).encode() + to_bytes(tensor))
    for sample in tqdm(samples, "hashing images", disable=None, leave=False):
        paths = str(sample.path.relative_to(root)), str(sample.scene.resolve().relative_to(root))
        with open(sample.path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(repr((*paths, sample.prompt, sample.value, sample.aligned, content)).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_samples(sd, samples, faults, root, folder, batch_size=8):
    """Write latents.bin (float16, a row for each readable image), broken.json ({number of another: fault}), prompts.bin."""
    vae, broken = next(sd.vae.parameters()), {}
    with open(folder / "latents.bin", "wb") as file:
        for start in tqdm(range(0, len(samples), batch_size), "encoding images", disable=None, leave=False):
            images = []
            for i, sample in enumerate(samples[start:start + batch_size], start):
                try:
                    images.append(crop(open_image(sample.path), sd.size))
                except Exception as error:  # a damaged file can raise anything in Pillow
                    broken[i] = f"{sample.path.name} is no readable image: {error}"
            check_unusable(faults + [f"{samples[i].where}: {fault}" for i, fault in broken.items()],
                           len(faults) + len(samples), root)
            if images:
                x = torch.stack(images).to(vae)  # (b, 3, size, size)
                mean, logvar = sd.vae.encode(torch.cat([x, x.flip(-1)]))  # (2b, 4, h, w) each
                both = torch.stack([mean, logvar], dim=1).unflatten(0, (2, -1))  # (2, b, 2, 4, h, w)
                file.write(to_bytes(both.transpose(0, 1).half()))
    write_json(folder / "broken.json", broken)
    prompts = unique_prompts(samples)
    with open(folder / "prompts.bin", "wb") as file:
        for start in range(0, len(prompts), batch_size):
            file.write(to_bytes(encode_prompts(sd, prompts[start:start + batch_size])))


def to_bytes(tensor):
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def map_file(path, shape, dtype):
    """A file as a memory-mapped tensor."""
    expected, got = math.prod(shape) * dtype.itemsize, path.stat().st_size if path.exists() else "none"
    if got != expected:
        raise UserError(f"{path}: expected a file of {expected} bytes, got {got}")
    return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)
