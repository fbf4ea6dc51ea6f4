"""What the commands of this repository share: one line for an error, options, files that are whole or absent."""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError


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


def grid(images):
    """Images of one size, row by row on a sheet that is nearly square."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def captioned(rows):
    """(caption, PIL images) of every row -> a sheet, each caption above its row. The images have one size."""
    font, (width, height) = ImageFont.load_default(), rows[0][1][0].size
    strip = 16  # pixels for a caption in the default font
    widths = [max(len(images) * width, math.ceil(font.getlength(caption)) + 8) for caption, images in rows]
    sheet = Image.new("RGB", (max(widths), len(rows) * (height + strip)), "white")
    for row, (caption, images) in enumerate(rows):
        top = row * (height + strip)
        ImageDraw.Draw(sheet).text((4, top + 2), caption, "black", font)
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, top + strip))
    return sheet


def comparison(without, with_value, principle):
    """Two captioned rows of pictures of the same noise: without the value token, and with it."""
    return captioned([("without a principle", without), (principle, with_value)])


def read_json(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, got {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


@contextlib.contextmanager
def atomic_folder(folder, marker):
    """Yield a temporary folder beside `folder`, to take its place if the block succeeds, to vanish if not.

    Only a folder with a file `marker`, an earlier one of its kind, is replaced.
    """
    folder = Path(folder).absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        replaceable = (folder / marker).exists() or folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not replaceable:
            raise UserError(f"{folder}: expected no such folder, or one with a {marker}, got another")
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
