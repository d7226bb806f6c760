"""The notebook of the examples works from top to bottom, in one process, offline, and is kept without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "fitune.ipynb"
EXECUTE = """
import ast, json, sys

names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        *body, last = ast.parse("".join(cell["source"])).body
        shows = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if shows else [*body, last], []), "cell", "exec"), names)
        if shows:  # as a notebook does with the value of the last line
            print(repr(eval(compile(ast.Expression(last.value), "cell", "eval"), names)))
"""


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.thorough
def test_every_cell_works_and_shows_what_its_heading_promises(tmp_path: Path) -> None:
    own = {
        "FITUNE_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "FITUNE_LANG": "en",
    }
    ran = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK)],
        cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout.splitlines()
    for begins in (
        "Prediction: allocated ",
        "True ",
        "Plan: ",
        "Summary: finished after 6 steps",
        "Comparison: ",
    ):
        assert any(line.startswith(begins) for line in shown), (begins, ran.stdout)
    assert "eval at step 6: loss " in ran.stderr  # the run that is not quiet shows its progress
    losses = [
        json.loads((tmp_path / "runs" / name / "summary.json").read_text())["eval_loss"]
        for name in ("first", "second")
    ]
    assert losses[0] < losses[1]  # the higher rate learns more in six steps


def test_it_is_kept_without_outputs_and_speaks_both_languages() -> None:
    for cell in cells():
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        else:
            heading, empty, chinese = "".join(cell["source"]).split("\n")[:3]
            assert heading.startswith("#")
            assert empty == ""
            assert re.search(r"[\u4e00-\u9fff]", chinese)
