"""Files and folders on disk: replaced by one rename, cached, and held by one process."""

import contextlib
import ctypes
import fcntl
import glob
import math
import os
import platform
import shutil
import tempfile
import warnings

from common import UserError, regular
from formats.messages import write_error

MAX_DEPTH = 200  # of folders; Python makes them recursively
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


@contextlib.contextmanager
def writing(path, suffix=""):
    """Yield a hidden name beside `path`, and remove what is there in the end. A failed write is a UserError."""
    temporary = None
    try:
        make_folder(path.parent)
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


def check_writable(folder):
    """Raise UserError if `folder` cannot be made and written to. Leaves nothing behind."""
    try:
        existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, got: {error.strerror}") from error


def check_replaceable(path):
    """Raise UserError if `path` is a folder or a device, which a file must not replace."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: expected a regular file to replace, or none, got another kind of file")


def make_folder(folder):
    if len(folder.parts) > MAX_DEPTH:
        raise UserError(f"{folder}: expected at most {MAX_DEPTH} folders, one in the other, got {len(folder.parts)}")
    folder.mkdir(parents=True, exist_ok=True)


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
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # of another user
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
    """Swap two folders at once, so that a reader always finds a complete one. -> whether the system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError, OSError):  # another C library, another system
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def cached(path, read, make, lock=None):
    """read(path), after make(path) if it is not there yet. A damaged one is made again, with a warning.

    lock: a folder that is held meanwhile, so that a second process waits for what the first one makes.
    """
    def attempt():
        return read(path if path.is_dir() else regular(path, "a file", math.inf))

    with contextlib.suppress(Exception):  # a damaged file can raise anything
        return attempt()
    with locked(lock, wait=True) if lock else contextlib.nullcontext():
        if os.path.lexists(path):
            try:
                return attempt()
            except Exception as error:
                warnings.warn(f"{path}: expected a sound cache, got {error}; it is made again")
                remove(path)
        make(path)
        return read(path)


@contextlib.contextmanager
def locked(folder, wait=False):
    """Hold a folder. The system frees it when the process ends, however it ends.

    A second process waits, or gets a UserError: of a run's folder.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{folder}: expected a run of one process, got one that another trains") from error
        except OSError:  # NFS locks no folders
            warnings.warn(f"{folder}: expected folders that can be locked, got others: keep to one run in it")
        yield
    finally:
        os.close(handle)
