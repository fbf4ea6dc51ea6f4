"""How a file or folder is replaced: under a hidden name first, then by one rename."""

import contextlib
import ctypes
import glob
import os
import platform
import shutil

from common import UserError
from formats.messages import write_error

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


@contextlib.contextmanager
def writing(path, suffix=""):
    """Yield a hidden name beside `path`, and remove what is there in the end. A failed write is a UserError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = hidden(path, suffix)
        yield temporary
    except UserError:
        raise
    except Exception as error:
        if not (reason := write_error(error)):
            raise
        raise UserError(f"{path}: expected to write it, got: {reason}") from error
    finally:
        if temporary:
            remove(temporary)


def hidden(path, suffix=""):
    """A hidden name beside `path`, of this process. What dead processes of this machine left there is removed."""
    prefix = f".{path.name}.{platform.node()}-"
    for leftover in path.parent.glob(glob.escape(prefix) + "*.tmp*"):
        process = leftover.name.removeprefix(prefix).split(".")[0]
        if process.isdecimal() and (int(process) == os.getpid() or not is_alive(int(process))):
            remove(leftover)
    return path.with_name(f"{prefix}{os.getpid()}.tmp{suffix}")


def is_alive(process):
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def remove(path):
    """Remove a file or folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def put(temporary, folder):
    """Rename the folder `temporary` to `folder`. One that is there is removed."""
    if not folder.exists():
        return os.replace(temporary, folder)
    if not exchange(temporary, folder):
        old = temporary.with_suffix(".old")
        os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            os.replace(old, folder)
            raise
        os.replace(old, temporary)
    remove(temporary)


def exchange(a, b):
    """Swap two folders in one step, so that a reader always finds a complete one. -> whether the system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError, OSError):  # another C library, another system
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
