"""docs/tutorial.ipynb runs, cell by cell, and shows images."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def code_cells(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cells: list[str]) -> list[bytes]:
    """The pictures that a notebook shows below its cells, as PNG; what a cell raises is raised."""
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells, 1):
        tree, place = ast.parse(cell), f"cell {number}"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, place, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
            if hasattr(value, "_repr_png_"):
                shown.append(value._repr_png_())
    return shown


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `docs` of a clone, the current one: where Jupyter runs a notebook."""
    (tmp_path / "workspace").symlink_to(ROOT / "workspace")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    return tmp_path / "docs"


@pytest.mark.slow
def test_the_tutorial_runs_and_shows_images(clone: Path, capsys) -> None:
    """As written, but for the length of the training."""
    cells = code_cells(json.loads(TUTORIAL.read_text(encoding="utf-8")))
    shorter = [cell.replace('"max_epochs": 30', '"max_epochs": 1') for cell in cells]
    assert shorter != cells
    pictures = run(shorter)
    assert len(pictures) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "disc" in capsys.readouterr().out
    assert [path.name for path in clone.iterdir()] == ["tutorial-output"]
    output = clone / "tutorial-output"
    assert (output / "report" / "report.html").is_file()
    assert len(list((output / "rings").iterdir())) == 4


def test_a_cell_that_fails_fails_the_test() -> None:
    with pytest.raises(ZeroDivisionError):
        run(["number = 0", "1 / number"])


def test_the_tutorial_is_a_notebook_of_version_4_5() -> None:
    notebook = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        needed = {"cell_type", "id", "metadata", "source"}
        needed |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == needed
    links = [line for cell in notebook["cells"] if cell["cell_type"] == "markdown"
             for line in cell["source"] if "](" in line]  # fmt: skip
    assert links
    for line in links:
        target = line.split("](")[1].split(")")[0]
        assert (TUTORIAL.parent / target).exists(), target
