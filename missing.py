"""The first import of every command: a Python package that is missing becomes one line instead of a traceback."""

import sys


def name_package(kind, error, traceback):
    """sys.excepthook: Python calls it for what nothing caught, such as the imports at the top of a module."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, traceback)
    package = {"PIL": "pillow"}.get(error.name, error.name)
    print(f"error: expected the Python package {package}, got none: pip install -r requirements.txt "
          "(the lab: requirements-dev.txt too)", file=sys.stderr)
    sys.exit(2)


sys.excepthook = name_package
