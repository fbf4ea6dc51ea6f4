"""The cache of a dataset: latents of all images and embeddings of all prompts, encoded once and memory-mapped."""

import hashlib
import math

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import atomic_folder, read_json, regular, write_json
from livo import encode_prompts


def crop(image, size):
    """PIL, RGB -> (3, size, size) in [-1, 1]: shorter side resized to `size`, center crop, as the authors do."""
    short = min(image.size)
    image = image.resize([size * side // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.array(image.crop((left, top, left + size, top + size)))  # (size, size, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def fingerprint(sd, samples, root):
    """The key of what `encode_samples` writes: a hash of the model, the metadata and the content of the images."""
    tokenizer = sd.tokenizer.max_length, sd.tokenizer.special_tokens, sd.tokenizer.backend.to_str()
    model = sd.vae.config, sd.unet.config.sample_size, sd.text_encoder.config, tokenizer
    digest = hashlib.sha256(repr(model).encode())
    for network in (sd.vae, sd.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(str(tensor.dtype).encode() + to_bytes(tensor))
    for sample in tqdm(samples, "hashing images", disable=None, leave=False):
        paths = str(sample.path.relative_to(root)), str(sample.scene.resolve().relative_to(root))
        with open(sample.path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(repr((*paths, sample.prompt, sample.value, sample.aligned, content)).encode())
    return digest.hexdigest()[:16]


def to_bytes(tensor):
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def load_latents(sd, samples, folder):
    """The encoded samples in the cache `folder`, which the first call makes.

    -> latents (n, 2, 2, 4, h, w) float16 of the images, plain and mirrored, mean and log-variance; {prompt: its
    embeddings (77, C)}; and {number of an unreadable image: fault}.
    """
    from formats.disk import cached  # imported late, as the method does not need it
    prompts = sorted({sample.prompt for sample in samples if sample.aligned})

    def make(folder):
        with atomic_folder(folder, "broken.json", keep=True) as temporary:
            encode_samples(sd, samples, prompts, temporary)

    def map_file(path, shape, dtype):
        size, got = math.prod(shape), regular(path, "a file of tensors", math.inf).stat().st_size
        if got != size * dtype.itemsize:  # torch would accept a larger file
            raise ValueError(f"{path.name}: expected {size * dtype.itemsize} bytes, got {got}")
        return torch.from_file(str(path), size=size, dtype=dtype).view(shape)

    def read(folder):
        shape = len(samples), 2, 2, sd.unet.config.in_channels, *[sd.unet.config.sample_size] * 2
        latents = map_file(folder / "latents.bin", shape, torch.float16)
        shape = len(prompts), sd.tokenizer.max_length, sd.text_encoder.config.hidden_size
        embeds = map_file(folder / "prompts.bin", shape, next(sd.text_encoder.parameters()).dtype)
        rows = range(len(samples))  # rows[i] raises IndexError for an image that is not there
        broken = {rows[int(i)]: fault for i, fault in read_json(folder / "broken.json").items()}
        return latents, dict(zip(prompts, embeds)), broken

    return cached(folder, read, make, lock=folder.parent)


@torch.no_grad()
def encode_samples(sd, samples, prompts, folder, batch_size=8):
    """Write the files that `load_latents` reads. An unreadable image is encoded as gray."""
    from formats.images import open_image
    weight, broken = next(sd.vae.parameters()), {}  # weight: of the VAE's dtype and device

    def read(i):
        try:
            return crop(open_image(samples[i].path), sd.size)
        except Exception as error:  # a damaged file can raise anything in Pillow
            broken[i] = f"{samples[i].path.name} is no readable image: {error}"
            return torch.zeros(3, sd.size, sd.size)

    rows = range(len(samples))
    with open(folder / "latents.bin", "wb") as file:
        for start in tqdm(rows[::batch_size], "encoding images", disable=None, leave=False):
            x = torch.stack([read(i) for i in rows[start:start + batch_size]]).to(weight)  # (b, 3, size, size)
            mean, logvar = sd.vae.encode(torch.cat([x, x.flip(-1)]))  # (2b, 4, h, w) each
            both = torch.stack([mean, logvar], dim=1).unflatten(0, (2, -1))  # (2, b, 2, 4, h, w)
            file.write(to_bytes(both.transpose(0, 1).half()))
    with open(folder / "prompts.bin", "wb") as file:
        for start in range(0, len(prompts), batch_size):
            file.write(to_bytes(encode_prompts(sd, prompts[start:start + batch_size])))
    write_json(folder / "broken.json", broken)
