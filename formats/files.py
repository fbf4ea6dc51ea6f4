"""Weight files beside a single plain one: shards, variants, .bin pickles, and parameter names of older versions."""

import math
import re
import warnings
import zipfile

import torch

from common import UserError, regular
from formats.messages import expecting
from vae import VAE

WEIGHT_FILE = re.compile(  # with the two places that versions of diffusers gave a shard's variant
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d+-of-(?P<shards>\d+))?(?:\.(?P<late_variant>\w+))?"
    r"\.(?P<format>safetensors|bin)")
MAX_NESTING = 4  # of "state_dict"
VAE_ATTENTION_NAMES = [  # q and proj_out in CompVis files, query and proj_attn in diffusers before 0.17
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])(uery|ey|alue)?\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_(out|attn)\.", r"\1.to_out.0.")]


def weight_files(names, dtype, where):
    """Of a folder's files, those that make up one network: a single one, or all its shards.

    Order of preference: safetensors before bin; for float16 the fp16 variant before the full one, else the full one
    before fp16; other variants (non_ema) last.
    """
    found = {}
    for name in names:
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["late_variant"] or "full"
            found.setdefault((match["format"], variant, int(match["shards"] or 1)), []).append(name)
    if not found:
        raise UserError(f"{where}: expected weights (.safetensors or .bin), got {', '.join(names[:5]) or 'no files'}")
    order = ["fp16", "full"] if dtype == torch.float16 else ["full", "fp16"]
    best = min(found, key=lambda key: (key[0] == "bin", (order + [key[1]]).index(key[1]), key[2]))
    if len(found[best]) != best[2]:
        raise UserError(f"{where}: expected {best[2]} shards like {found[best][0]}, got {len(found[best])}")
    return found[best]


class ModelCheckpoint:
    """Stands for pytorch_lightning's class of this name, which SD 1.x's .ckpt files mention. Does nothing."""


def unpickle(path, mmap=False):
    """The content of a file of torch. No code in it is executed, and it takes no more memory than its size."""
    stub = (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    zipped = zipfile.is_zipfile(path := regular(path, "a file of torch", math.inf))
    if any(b"bytearray" in pickle for pickle in (read_archive(path) if zipped else [path.read_bytes()])):
        raise UserError(f"{path}: expected a file of tensors, got one that makes a bytearray, maybe of any size")
    with torch.serialization.safe_globals([stub]), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)


def read_pickle(path):
    """A .ckpt or .bin file -> {name: memory-mapped tensor}."""
    with expecting(path, "a file of tensors"):
        tensors = unpickle(path, mmap=True)
        for _ in range(MAX_NESTING):  # twice in some files; a hostile one may hold itself
            tensors = tensors.get("state_dict", tensors)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def read_archive(path):
    """The pickles in a zip archive. Raises UserError if it inflates to more than its size: torch compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        if large := [info.filename for info in archive.infolist() if info.file_size > info.compress_size]:
            raise UserError(f"{path}: expected an uncompressed archive of tensors, got {large[0]} compressed")
        return [archive.read(info) for info in archive.infolist() if info.filename.endswith(".pkl")]


def check_tensors(tensors, path):
    """Return {name: tensor}. Raise UserError unless the names are texts and the tensors plain numbers in memory."""
    for name, tensor in tensors.items():
        kind = ("without data" if tensor.is_meta else "quantized" if tensor.is_quantized else
                f"of layout {tensor.layout}" if tensor.layout != torch.strided else
                "of repeated numbers" if tensor.nbytes > tensor.untyped_storage().nbytes() else "")
        if kind or not isinstance(name, str):
            raise UserError(f"{path}: expected dense tensors with names, got one named {name!r:.80} {kind}")
    return tensors


def load_adamw(optimizer, state, step, path):
    """Load the moments of AdamW after so many steps. Its options stay. Raises an error if they do not fit."""
    for moments in state["state"].values():
        check_tensors(moments, path)  # before torch takes nested lists apart, which may hold 10^12 texts
    optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    fits = len(optimizer.state) == (step > 0) * sum(len(group["params"]) for group in optimizer.param_groups) and all(
        moments["step"] == step and {name: x.shape for name, x in moments.items()} == {
            "step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p, moments in optimizer.state.items())
    usable = all(x.isfinite().all() and moments["exp_avg_sq"].min() >= 0
                 for moments in optimizer.state.values() for x in moments.values())
    if not (fits and usable) or type(step) is not int or step < 0:
        raise ValueError("no number of steps, or moments of other steps, shapes or ranges")


def match_names(tensors, expected, network, where):
    """Rename the parameters of older versions -> {name: tensor} with the names and shapes of `expected`.

    Empties `tensors`. Raises UserError where one is missing, left over or of another shape.
    """
    matched = {}
    for name in [*tensors]:
        tensor = tensors.pop(name)
        if name.endswith("embeddings.position_ids"):  # the numbers 0, 1, 2, …, no weights
            continue
        new = modern_name(name, expected)
        if network is VAE and new in expected and expected[new].ndim == 2 and tensor.ndim > 2:
            tensor = tensor.flatten(1)  # a 1×1 convolution (C, C, 1, 1)
        matched[name if new in matched or new in tensors else new] = tensor
    wrong = {
        "missing": [name for name in expected if name not in matched],
        "unexpected": [name for name in matched if name not in expected],
        "of another shape": [f"{name} {tuple(matched[name].shape)} for {tuple(t.shape)}"
                             for name, t in expected.items() if name in matched and matched[name].shape != t.shape],
        "of no floats": [f"{name} {t.dtype}" for name, t in matched.items() if not t.is_floating_point()]}
    if any(wrong.values()):
        got = "; ".join(f"{len(some)} {how}: {', '.join(some[:3])}" for how, some in wrong.items() if some)
        raise UserError(f"{where}: expected the {len(expected)} tensors of a {network.__name__}, got {got}")
    return matched


def modern_name(name, expected):
    """The name in `expected` that an old parameter name stands for; the old name itself if there is none."""
    vae_name = name
    for pattern, replacement in VAE_ATTENTION_NAMES:
        vae_name = re.sub(pattern, replacement, vae_name)
    return next((new for new in (name, f"text_model.{name}", vae_name) if new in expected), name)
