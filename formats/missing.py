"""The first import of every command: a package that is missing, or that fails in its import, becomes one line."""

import sys
from traceback import walk_tb


def name_package(kind, error, traceback):
    importing = {frame.f_code.co_filename for frame, _ in walk_tb(traceback) if frame.f_code.co_name == "<module>"}
    if issubclass(kind, ModuleNotFoundError):
        name = error.name.split(".")[0].replace("PIL", "pillow")
        text = f"expected the Python package {name}, got none: pip install {name}"
    elif issubclass(kind, Exception) and any("-packages" in file for file in importing):
        text = f"expected packages and environment variables that fit together, got: {error}"  # such as MPLBACKEND
    else:
        return sys.__excepthook__(kind, error, traceback)
    print("error:", *text[:1000].split(), file=sys.stderr)
    sys.exit(2)


sys.excepthook = name_package  # Python calls it for what nothing caught
