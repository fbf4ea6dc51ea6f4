"""The notebook walkthrough.ipynb: the names in its text exist, it was executed without errors. .ci/run executes it."""

import ast
import base64
import io
import json
import re

from PIL import Image

from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def parse(file):
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))


def names_in(tree):
    """Everything that a syntax tree names: variables, attributes, arguments, functions, classes."""
    kinds = "id", "attr", "arg", "name"
    return {getattr(node, kind) for node in ast.walk(tree) for kind in kinds if hasattr(node, kind)}


def test_symbols_have_the_names_of_the_table():
    rows = re.findall(r"(?m)^\|(.+)\|(.+)\|(.+)\| \[([\w/]+\.py)\]\(\4\) \|(.*)\|$", TEXT)
    assert len(rows) > 15
    for *_, names, file, where in rows:
        where = where.strip(" `")  # a function or class of the file, or nothing
        definitions = [node for node in ast.walk(parse(file)) if not where or getattr(node, "name", None) == where]
        assert set(re.findall("`(.+?)`", names)) <= names_in(definitions[0]), f"{names} in {file} {where}"


def test_sections_name_files_and_functions_that_exist():
    sentences = re.findall(r"(?s)\*Files?:\* (.+?)\.(?:\s|$)", TEXT)
    assert len(sentences) > 12
    for sentence in sentences:
        for word in re.findall("`(.+?)`", sentence):
            if word.endswith(".py"):
                names = names_in(parse(word))
            else:
                assert set(word.split(".")) <= names, word


def test_it_was_executed_without_errors_and_its_figures_are_opaque():
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    figures = [base64.b64decode(data) for output in outputs for kind, data in output.get("data", {}).items()
               if kind.startswith("image/")]
    assert len(figures) > 15
    for figure in figures:
        assert Image.open(io.BytesIO(figure)).convert("RGBA").getextrema()[3] == (255, 255)
