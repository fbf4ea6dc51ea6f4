"""What every command shares: options, one-line errors, atomic files."""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path


class UserError(Exception):
    """An error caused by user input. It is printed as one line, exit code 2."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, **kwargs)

    def error(self, message):
        from formats.messages import of_argparse
        raise UserError(of_argparse(message))


def run(main):
    """Call main(). What is due to the input or the system becomes `error: …`, exit code 2; Ctrl-C is exit code 130."""
    from formats.messages import drop_unwritten, explain, prepare_streams, tell
    prepare_streams()
    try:
        main()
        print(end="", flush=True)  # here, where a closed pipe or a full disk can still be reported
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(130)
    except Exception as error:
        if not (text := explain(error)):
            raise
        tell("error:", text)
        sys.exit(2)
    finally:
        drop_unwritten()


def number(kind, low, high):
    """An argparse type: a number from low to high, both included."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # this refuses NaN too
                return value
        words = f"an integer from {low:.0f}" if kind is int else f"a number from {low:g}"
        raise argparse.ArgumentTypeError(f"expected {words} to {high:.0f}, got {text!r:.60}")

    return parse


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def regular(path, what, largest=2**26):
    """The path of a regular file of at most `largest` bytes. Raises UserError for others, which may never end."""
    if os.path.isfile(path) and os.path.getsize(path) <= largest:
        return Path(path)
    got = ("a folder" if os.path.isdir(path) else f"more than {largest} bytes" if os.path.isfile(path) else
           "no regular file" if os.path.lexists(path) else "none")
    raise UserError(f"{path}: expected {what}, got {got}")


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`. Rename it to `path` if the block succeeds, else remove it."""
    from formats.disk import check_replaceable, writing
    path = Path(path)
    check_replaceable(path)
    with writing(path, path.suffix) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(folder, marker, keep=False):
    """The same for a folder. An existing one is replaced only if it has a file `marker`, as an earlier one of its kind.

    keep: nor is it replaced then, as another process has made it meanwhile.
    """
    from formats.disk import put, writing
    folder = Path(folder).absolute()
    with writing(folder) as temporary:
        if folder.exists() and not (folder / marker).exists() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"{folder}: expected no such folder, or one with a {marker}, got another")
        temporary.mkdir()
        yield temporary
        if not (keep and (folder / marker).exists()):
            put(temporary, folder)


def read_json(path, **kinds):
    """The object in a JSON file. Raises UserError for anything else, or where a key has no value of its kind."""
    try:
        content = json.loads(regular(path, "a JSON file").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last of deeply nested JSON
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: expected {kind.__name__} as {key}, got {content.get(key)!r}")
    return content


def write_json(path, content):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
