"""The notebook walkthrough.ipynb: the names in its text exist, it was executed without errors.

It is executed in .ci/run, not here.
"""

import ast
import base64
import io
import json
import re

from PIL import Image

from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "walkthrough.ipynb"
MAX_BYTES = 1.5e6
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def parse(file):
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))


def names_in(tree):
    """Everything that a syntax tree names: variables, attributes, arguments, functions, classes."""
    return {getattr(node, key) for node in ast.walk(tree) for key in ("id", "attr", "arg", "name") if hasattr(node, key)}


def definition(tree, name):
    return next(node for node in ast.walk(tree) if getattr(node, "name", None) == name)


def test_symbols_have_the_names_of_the_table():
    rows = re.findall(r"(?m)^\|(.+)\|(.+)\|(.+)\| \[([\w/]+\.py)\]\(\4\) \|(.*)\|$", TEXT)
    assert len(rows) > 15
    for *_, names, file, where in rows:
        tree, where = parse(file), where.strip(" `")
        tree = definition(tree, where) if where else tree
        assert set(re.findall("`(.+?)`", names)) <= names_in(tree), f"{names} in {file} {where}"


def test_sections_name_files_and_functions_that_exist():
    sentences = re.findall(r"(?s)\*Files?:\* (.+?)\.(?:\s|$)", TEXT)
    assert len(sentences) > 12
    for sentence in sentences:
        for word in re.findall("`(.+?)`", sentence):
            if word.endswith(".py"):
                names = names_in(parse(word))
            else:
                assert set(word.split(".")) <= names, word


def test_it_was_executed_without_errors():
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    for output in (output for cell in CODE for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output


def test_figures_are_opaque():
    figures = [base64.b64decode(data) for cell in CODE for output in cell["outputs"]
               for kind, data in output.get("data", {}).items() if kind.startswith("image/")]
    assert len(figures) > 15
    for figure in figures:
        assert Image.open(io.BytesIO(figure)).convert("RGBA").getextrema()[3] == (255, 255)
