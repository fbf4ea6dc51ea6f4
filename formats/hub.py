"""Checkpoints by name: `owner/name`, or `owner/name:folder`, of the Hugging Face hub. Fetches only what is loaded."""

import re
import warnings
from pathlib import Path

from common import UserError
from formats.checks import check_sd_files, text_encoder_prefix, under
from formats.files import weight_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+)?")
FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def fetch(source, choose, markers):
    """A hub name -> the Path of its folder in the cache, up to date if the hub can be reached. Raises UserError.

    choose: the files of a repository -> those to fetch. markers: a cached copy holds one of these files.
    """
    if not HUB_NAME.fullmatch(source) or ".." in re.split("[/:]", source) or source.endswith(FILE_SUFFIXES):
        raise UserError(f"{source}: expected a file, a folder or a hub name (owner/name), got nothing there")
    try:
        from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache  # slow to import
    except ValueError as error:  # of a variable such as HF_HUB_DOWNLOAD_TIMEOUT
        raise UserError(f"huggingface_hub: expected variables that it understands, got {error}") from error

    repository, _, folder = source.partition(":")
    prefix = folder.strip("/") + "/" if folder else ""
    try:
        info = HfApi().model_info(repository)
        check_names(source, info.sha, [file.rfilename for file in info.siblings])
        names = under(prefix, [file.rfilename for file in info.siblings])
        return Path(snapshot_download(repository, allow_patterns=[prefix + name for name in choose(names)]), prefix)
    except UserError:
        raise
    except Exception as error:  # the classes of connection errors change with huggingface_hub's HTTP library
        if type(error).__name__ == "HFValidationError":
            raise UserError(f"{source}: expected a file, a folder or a hub name, got none: {error}") from error
        for marker in markers:
            if isinstance(cached := try_to_load_from_cache(repository, prefix + marker), str):
                warnings.warn(f"{source}: using the cached copy, the hub gave {type(error).__name__}")
                return Path(cached.removesuffix(marker))
        raise UserError(f"{source}: expected a local path or a repository of the hub, got neither "
                        f"({type(error).__name__}: {error})") from error


def check_names(source, commit, names):
    """Raise UserError if a server names a commit or a file that would be written outside of the cache."""
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise UserError(f"{source}: expected a commit of the hub, got {commit!r}")
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError(f"{source}: expected files of a repository, got {name!r}")


def fetch_sd(source, dtypes):
    """A Stable Diffusion: every network once, and no safety checker. dtypes: of the networks, by name."""

    def choose(names):
        check_sd_files(names, source)
        files = [name for name in names if name.startswith(("tokenizer/", "scheduler/"))]
        for network, dtype in dtypes.items():
            weights = weight_files(under(f"{network}/", names), dtype, f"{source} {network}/")
            files += [f"{network}/{name}" for name in ["config.json", *weights]]
        return files

    return fetch(str(source), choose, ["unet/config.json"])


def fetch_text_encoder(source, dtype):
    """A text encoder, or the one in a value_encoder/."""

    def choose(names):
        prefix = text_encoder_prefix(names, source)
        return [prefix + name for name in ["config.json", *weight_files(under(prefix, names), dtype, source)]]

    return fetch(str(source), choose, ["config.json", "value_encoder/config.json"])
