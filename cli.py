"""What the commands of this repository share: one line for an error, options, files that are whole or absent."""

import argparse
import contextlib
import ctypes
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can mend. The command prints its one line and ends with exit code 2."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and reports a bad option as every other error is reported."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, **kwargs)

    def error(self, message):
        raise UserError(message)


def keep_freed_memory(large=False):
    """Let glibc's malloc reuse what is freed from now on. By default it hands large blocks back to the system, which
    clears every page of the next one: on a CPU that doubles the time of a layer whose output takes tens of megabytes.
    Blocks above 32 MB, the most that glibc allows, still go back, unless `large`: kept ones would leave gaps in the
    peak of a VAE. A full-size UNet's way back wants them kept, for the weights that it rearranges in every layer."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
    with contextlib.suppress(AttributeError, TypeError):  # another C library, another system
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # the gaps that loading has left
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if large:
            libc.mallopt(M_MMAP_MAX, 0)


def run(main):
    """Call `main()`. A UserError becomes `error: …` on stderr and exit code 2, Ctrl-C exit code 130; a warning
    is one line too."""
    warnings.showwarning = lambda text, *_: print(f"warning: {' '.join(str(text).split())}", file=sys.stderr)
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def number(kind, low, high):
    """An argparse type: a number from low to high, ends included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # so is NaN caught
            raise argparse.ArgumentTypeError(f"expected {low} … {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's words for text that is no number at all
    return parse


def add_device_options(parser, default="fp16 on CUDA, else fp32"):
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"],
                        help=f"auto is the fastest; on some CPUs that is bf16 for a full-size model (default: {default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")


def pick_device(name, dtype):
    """The options --device and --dtype -> torch's device and dtype, None for "auto", which the model has a say in.
    Under torchrun "auto" and "cuda" are a GPU for each process of the machine. Raises UserError for an absent device.
    """
    try:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        else:
            device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where the kernels of attention.py start
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has no narrower one
        first_sentence = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: {first_sentence}") from error
    dtype = dtype or ("fp16" if device.type == "cuda" else "fp32")
    return device, {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def check_writable(folder):
    """Raise UserError if `folder` cannot be made and written to. Leaves nothing behind."""
    try:
        existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, got: {error.strerror}") from error


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; rename it to `path` if the block succeeds, remove it if not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
