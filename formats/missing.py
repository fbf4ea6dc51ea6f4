"""The first import of every command: a Python package that is missing becomes one line instead of a traceback."""

import sys


def name_package(kind, error, traceback):
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, traceback)
    name = error.name.split(".")[0].replace("PIL", "pillow")
    print(f"error: expected the Python package {name}, got none: pip install {name}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = name_package  # Python calls it for what nothing caught
