"""In a notebook a run is one block that changes, whatever its length."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fitune
from fitune.allocator.peaks import Living
from fitune.allocator.prediction import Prediction
from fitune.cli.output import html_block
from fitune.cli.progress import TrainingProgress, open_progress
from fitune.report.compare import compare
from fitune.run.metrics import Summary
from fitune.units import GIB
from tiny_run import save_tiny_model, write_dialogues
from written_runs import Recipe, write_run

SOURCE = Path(__file__).parents[2] / "src"


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
    module.display = SimpleNamespace(
        HTML=lambda html: SimpleNamespace(html=html), display=shown.display
    )
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


def test_what_the_verbs_return_is_a_sentence_and_one_block_each(tmp_path: Path) -> None:
    living = tuple(Living(f"tensor {number}", "aten.mm", "activation", 1) for number in range(100))
    prediction = Prediction(
        peak_allocated_bytes=GIB, peak_reserved_bytes=2 * GIB, device_bytes=3 * GIB, device_interval=None,
        categories={"parameter": GIB, "input": 0}, peak_phase="backward", modules=living, tensors=living, fits=True,
        num_alloc_retries=0, first_oom=None, assumptions=(),
    )  # fmt: skip
    assert repr(prediction) == (
        "Prediction: allocated 1.0 GiB, reserved 2.0 GiB, device used 3.0 GiB · fits · at the peak (backward): "
        "parameter 1.0 GiB"
    )
    summary = Summary(
        status="finished",
        steps=3,
        tokens=1500,
        seconds=61.0,
        eval_loss=2.5,
        peak_reserved_bytes=GIB,
    )
    assert repr(summary) == (
        "Summary: finished after 3 steps, 1.5 k tokens, 1m01s | eval loss 2.5000 | peak memory 1.0 GiB"
    )
    compared = compare([write_run(tmp_path, "one", Recipe()), write_run(tmp_path, "two", Recipe())])
    assert repr(compared).startswith("Comparison: one, two · ")
    assert prediction._repr_html_().count("<pre") == 1
    assert "finished after 3 steps" in summary._repr_html_()


def test_they_are_chinese_where_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert repr(Summary(status="finished", steps=3)).startswith("运行总结：3 步后已完成")


def test_a_block_is_in_a_font_of_equal_widths_and_is_shown_once(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich, which looks for a notebook itself, would show what it prints as well."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    block = html_block(lambda screen: screen.print("one line"))
    assert "font-family:monospace" in block
    assert "one line" in block
    assert notebook.num_blocks == 0
    assert capsys.readouterr().out == ""


def test_what_python_lists_of_fitune_is_what_there_is_to_call() -> None:
    assert dir(fitune) == sorted(fitune.__all__)
    assert set(dir(fitune)) == {
        "SafeStep", "__version__", "compare", "plan", "predict", "predict_loop", "predict_script",
        "predict_trainer", "train",
    }  # fmt: skip
    assert all(callable(getattr(fitune, name)) for name in fitune.__all__ if name != "__version__")


def test_quiet_shows_no_block(notebook: Notebook) -> None:
    assert isinstance(open_progress(quiet=True), TrainingProgress)


def test_ipython_in_a_terminal_is_no_notebook(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "model  tiny" in done.stdout, done.stderr
