"""What `fitune train` shows while it works: stages by name, then steps with the time left."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fitune.cli import progress as progress_module
from fitune.cli.output import Screen
from fitune.cli.progress import TrainingProgress
from fitune.cli.train import next_commands
from fitune.run.directory import RunDirectory, create_run
from watched_run import step_metrics


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "en")


def lines_of(page: io.StringIO) -> list[str]:
    """As a terminal is sent them, without colours and movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_stage_is_shown_by_name_and_without_a_share() -> None:
    page = io.StringIO()
    with TrainingProgress(
        quiet=False, screen=Screen(file=page, force_terminal=True, width=80)
    ) as shown:
        shown.stage("reading the data")
        shown.stage("loading the model")
    lines = lines_of(page)
    assert any(line.startswith("loading the model") for line in lines)
    assert not any("%" in line or "train" in line for line in lines)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_time_left_is_never_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100, 200))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(seconds)))
    page = io.StringIO()
    with TrainingProgress(
        quiet=False, screen=Screen(file=page, force_terminal=True, width=width)
    ) as shown:
        for step in (123_456, 123_457):
            shown.step(replace(step_metrics(step), lr=2e-5), progress=step / 1e6)
    last = lines_of(page)[-1]
    assert re.match(r"train .* 12% left 243h\d\dm \| step 123457 \| loss [\d.]+", last)
    assert ("lr 2.0e-05" in last) == (width == 160)
    assert len(last) <= width
    assert "…" not in last


def test_a_log_names_the_stage_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    page = io.StringIO()
    with TrainingProgress(quiet=False, screen=Screen(file=page)) as shown:
        for second, stage in (
            (0, "reading the data"),
            (1, "recording the step: 1 of 9"),
            (11, "loading the model"),
        ):
            now[0] = 100.0 + second
            shown.stage(stage)
    assert lines_of(page) == ["       reading the data", "       loading the model"]


@pytest.mark.parametrize("adapter", [True, False])
def test_what_can_be_done_next_is_said_after_training(tmp_path: Path, adapter: bool) -> None:
    run = create_run(tmp_path, "first")
    run.best.mkdir()
    if adapter:
        (run.best / "adapter_config.json").touch()
    lines = list(next_commands(run, run.best, is_finished=True))
    assert ("is an adapter" in lines[0], "merges both into one" in lines[0]) == (adapter, adapter)
    assert f"fitune export {run.path} --to hf -o first-hf" in lines[0]
    assert f"fitune report {run.path} " in lines[1]
    (again,) = next_commands(run, run.last, is_finished=False)
    assert again == f"next: fitune train --resume {run.path} goes on with it"


def test_a_run_in_its_usual_place_is_called_by_its_name() -> None:
    run = RunDirectory(Path("runs") / "first")
    assert "fitune advise first " in list(next_commands(run, run.last, is_finished=True))[1]
