"""Messages of argparse and of the system in the form of this repository: `what: expected …, got …`."""

import contextlib
import os
import re
import sys
import warnings
from errno import EDQUOT, EFBIG, EIO, ENOMEM, ENOSPC, EPIPE
from pickle import UnpicklingError

import torch

from common import UserError

# Options that have a new name, or none.
RENAMED = {"--value-share": "--value-fraction", "--harmless": "--preservation", "--token-lr": "--final-ln-lr-scale"}
REMOVED = "--bias-share", "--bias-alpha-scale", "--t-low", "--min-timestep", "--together", "--group-size"
ARGPARSE = {
    r"^argument (?:-\w/)?": "",
    r"invalid choice: (.*) \(choose from (.*)\)": r"expected one of \2, got \1",
    r"invalid (.*) value: (.*)": r"expected \1, got \2",
    r"expected (one|at least one) argument": "expected a value, got none",
    r"ignored explicit argument (.*)": r"expected no value, got \1",
    r"^the following arguments are required: (.*)": r"expected \1, got none",
    r"not allowed with argument (.*)": r"expected it without \1, got both",
    r"^ambiguous option: (.*) could match (.*)": r"expected one of \2, got \1",
    r"^unrecognized arguments: (.*)": r"expected the options of --help, got \1"}
SYSTEM = EPIPE, ENOSPC, EDQUOT, EFBIG, EIO, ENOMEM  # errors that name no file


def prepare_streams():
    """Make stdout and stderr take any text, and print warnings as one line each."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
    warnings.showwarning = lambda text, *_: tell("warning:", text)


def tell(*words):
    """Print a line on stderr, unless that is a closed pipe or full: the exit code tells it too."""
    try:
        print(one_line(" ".join(map(str, words))), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # Python flushes the other again when it exits


def drop_unwritten():
    """Give up a stdout that is a closed pipe or full: Python flushes it again when it exits, and fails in its words."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def one_line(text, length=1000):
    """A text without line breaks, overlong words, and control characters, which could rewrite a terminal."""
    line = re.sub(r"(\S{80})\S{80,}", r"\1…", " ".join(str(text).split()))
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= length else line[:length] + "…"


@contextlib.contextmanager
def expecting(where, what):
    """Whatever reading a file or folder `where` raises becomes a UserError: damage can raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # torch's own message advises to allow all code. What it refused is the error's context.
        cause = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
        raise UserError(f"{where}: expected {what}, got {type(cause).__name__}: {cause}") from error


def of_argparse(message):
    unknown = message.split() if message.startswith("unrecognized arguments") else []
    for word in unknown:
        if word.split("=")[0] in REMOVED:
            return f"expected no such option, as tiny-sd needs it no more, got {word}"
        if new := RENAMED.get(word.split("=")[0]):
            return f"expected {new}, the new name of the option, got {word}"
    for pattern, words in ARGPARSE.items():
        message = re.sub(pattern, words, message, flags=re.DOTALL)
    return message


def explain(error):
    """An exception -> its message, if it is due to the input or the system; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Warning):
        return f"expected no warning, as -W or PYTHONWARNINGS asks, got: {error}"
    if reason := write_error(error):
        return f"{getattr(error, 'filename', None) or 'a file or pipe'}: expected to read or write it, got {reason}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"expected enough memory, got too little: {error}"


def write_error(error):
    """-> what the system says about a failed reading or writing; None for another error.

    An OSError with neither a file nor a number of SYSTEM is a fault of the program, which should not be hidden.
    torch, safetensors and Pillow have no class for a full disk. The system's error may be the context of torch's.
    """
    for this in (error, error.__context__ if type(error) is RuntimeError else None):
        if isinstance(this, OSError) and (this.filename or this.errno in SYSTEM):
            return this.strerror or str(this)
    return str(error) if re.search("inline_container|I/O error|encoder error", str(error)) else None
