"""In a notebook a run is one block that changes, whatever its length."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fitune
from fitune.cli.progress import TrainingProgress, open_progress
from tiny_run import save_tiny_model, write_dialogues

SOURCE = Path(__file__).parent.parent / "src"


class Notebook:
    """Keeps what IPython's display would show: `blocks` holds every state of the one block, or of several."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.states: list[str] = []

    def display(self, block: SimpleNamespace, *, display_id: bool) -> "Notebook":
        self.num_blocks += 1
        self.states.append(block.html)
        return self

    def update(self, block: SimpleNamespace) -> None:
        self.states.append(block.html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    shown = Notebook()
    module: Any = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(kernel=object())
    module.display = SimpleNamespace(HTML=lambda html: SimpleNamespace(html=html), display=shown.display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    return shown


def test_a_run_is_one_block_that_ends_as_watch_shows_it(
    notebook: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fitune.cli.notebook.REFRESH_SECONDS", 0.0)
    config = {
        "model": {"source": str(save_tiny_model(tmp_path / "tiny"))},
        "data": {"train": str(write_dialogues(tmp_path / "<b>.jsonl")), "max_length": 64},
        "run": {"output": str(tmp_path / "runs"), "name": "run"},
        "train": {"steps": 2},
    }
    fitune.train(config)
    assert notebook.num_blocks == 1
    assert len(notebook.states) > 5
    assert "finished" in notebook.states[-1]
    assert "step 2/2 (100.0%)" in notebook.states[-1]
    assert "&lt;b&gt;.jsonl" in notebook.states[-1]
    assert "<b>" not in notebook.states[-1]


def test_a_block_is_not_shown_more_often_than_every_two_seconds(notebook: Notebook) -> None:
    with open_progress(quiet=False) as progress:
        for number in range(1000):
            progress.note(f"line {number}")
    assert len(notebook.states) == 2
    assert "line 999" in notebook.states[-1]


def test_quiet_shows_no_block(notebook: Notebook) -> None:
    assert isinstance(open_progress(quiet=True), TrainingProgress)


def test_ipython_in_a_terminal_is_no_notebook(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert isinstance(open_progress(quiet=False), TrainingProgress)


def test_the_block_is_one_that_ipython_itself_displays() -> None:
    """In a process of its own: IPython's shell changes the one that it is made in."""
    pytest.importorskip("IPython")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "from IPython.utils.capture import capture_output\n"
        "from fitune.cli.progress import open_progress\n"
        "InteractiveShell.instance().kernel = object()\n"
        "with capture_output() as captured, open_progress(quiet=False) as progress: progress.note('model  tiny')\n"
        "print([output.data['text/html'] for output in captured.outputs])"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "IPYTHONDIR": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "model  tiny" in done.stdout, done.stderr
