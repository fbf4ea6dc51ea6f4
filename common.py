"""What every command shares: options, one-line errors, atomic files."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch

# Options that have a new name.
RENAMED = {"--t-low": "--min-timestep", "--bias-share": "--bias-alpha-scale", "--token-lr": "--final-ln-lr-scale",
           "--together": "--group-size", "--value-share": "--value-fraction", "--harmless": "--preservation"}


class UserError(Exception):
    """An error caused by user input. It is printed as one line, exit code 2."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if new := RENAMED.get(str(word).split("=")[0]):
                raise UserError(f"expected {new}, the new name of the option, got {word}")
        return super().parse_args(args, namespace)

    def error(self, message):
        raise UserError(message)


def run(main):
    """Call main(). A UserError becomes `error: …` and exit code 2, Ctrl-C exit code 130; a warning is one line too."""
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
    """An argparse type: a number from low to high, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # this refuses NaN too
            raise argparse.ArgumentTypeError(f"expected {low} … {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its error
    return parse


def add_device_options(parser, default="fp16 on CUDA, else fp32"):
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"],
                        help=f"auto is the fastest; on some CPUs that is bf16 for a full-size model (default: {default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")


def pick_device(name, dtype):
    """The options --device and --dtype -> torch.device, torch.dtype (None for "auto": the model decides too).

    Under torchrun each process of a machine gets a GPU of its own. Raises UserError for a device that is not there.
    """
    try:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        else:
            device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where the kernels of attention.py start
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises nothing narrower
        raise UserError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}") from error
    dtype = dtype or ("fp16" if device.type == "cuda" else "fp32")
    return device, {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def check_writable(folder):
    """Raise UserError if `folder` cannot be made and written to. Leaves nothing behind."""
    try:
        existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, got: {error.strerror}") from error


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`. Rename it to `path` if the block succeeds, else remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    if path.exists() and not path.is_file():  # a folder, a device
        raise UserError(f"cannot write {path}: expected a regular file, or none")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(folder, marker):
    """The same for a folder. An existing one is replaced only if it has a file `marker`, as an earlier one of its kind."""
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
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_json(path):
    """The object in a JSON file. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the last of deeply nested JSON
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
