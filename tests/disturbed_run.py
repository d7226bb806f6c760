"""Runs of a tiny model that are disturbed, beside one that was left alone: what both come to must be the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import StepMetrics, read_summary
from fitune.training.checkpoint.read import newest_checkpoint
from tiny_run import save_tiny_model, write_config, write_dialogues

RUN, UNDISTURBED = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/undisturbed"))
STEPS = 9
TIMES = {
    "seconds",
    "tokens_per_second",
    "device_used_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
}


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(scope="session")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny/, sft.jsonl, sft.yaml, a run that was left alone and one that died in step 5."""
    directory = tmp_path_factory.mktemp("left_alone")
    write_run(directory, steps=STEPS)
    with pytest.MonkeyPatch.context() as patched:
        predict_nothing(patched)
        patched.chdir(directory)
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        train("sft.yaml", "run.name=undisturbed")
        train_until(5, "sft.yaml", monkeypatch=patched)
    return directory


@pytest.fixture
def disturbed(left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: as `left_alone`, without the run that died. There is no prediction, which takes most of
    the time of so small a run, and no waiting for room."""
    predict_nothing(monkeypatch)
    for user in ("saving", "train"):
        monkeypatch.setattr(f"fitune.training.{user}.LAST_SAVE_SECONDS", 0.0)
    monkeypatch.setenv("FITUNE_CACHE", str(left_alone / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(left_alone / "tiny")
    for name in ("sft.jsonl", "sft.yaml"):
        shutil.copy2(left_alone / name, name)  # with its time, by which the cache knows it
    shutil.copytree(left_alone / UNDISTURBED.path, UNDISTURBED.path)
    return tmp_path


@pytest.fixture
def crashed(left_alone: Path, disturbed: Path) -> None:
    """runs/run died in step 5, after the checkpoint of step 4."""
    shutil.copytree(left_alone / RUN.path, RUN.path)


def predict_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run says that its memory is not predicted, and trains as it is configured."""
    for name in ("choose_plan", "predict_second_step"):
        monkeypatch.setattr(f"fitune.training.prepare.{name}", None)


def write_run(directory: Path, *, steps: int) -> None:
    """tiny/, sft.jsonl and sft.yaml: a run of so many steps, saved every second one, evaluated every third."""
    save_tiny_model(directory / "tiny")
    write_dialogues(directory / "sft.jsonl")
    write_config(
        directory / "sft.yaml", {"train": {"steps": steps, "save_every": 2, "eval_every": 3}}
    )


def train(*arguments: str, exit_code: int = 0) -> None:
    assert main(["train", *arguments]) == exit_code


def train_until(step: int, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when that step is told."""

    def die(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "step", die)
        with pytest.raises(Killed):
            main(["train", *arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 2) -> str:
    capsys.readouterr()
    train(*arguments, exit_code=exit_code)
    notes = capsys.readouterr().err
    return notes[notes.index("error: ") :]


def weights(run: RunDirectory, *, which: str = "last") -> bytes:
    directory = run.path / which
    return next(directory.glob("*.safetensors")).read_bytes()


def log(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of the metrics, without what the clock and the memory say."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(run: RunDirectory = RUN, other: RunDirectory = UNDISTURBED) -> None:
    assert weights(run) == weights(other)
    assert weights(run, which="best") == weights(other, which="best")
    assert log(run) == log(other)
    assert read_journal(run.journal)[-1].hash == read_journal(other.journal)[-1].hash
    summary, expected = read_summary(run.summary), read_summary(other.summary)
    for name in (
        "status",
        "steps",
        "tokens",
        "supervised_tokens",
        "train_loss",
        "eval_loss",
        "best_eval_loss",
    ):
        assert getattr(summary, name) == getattr(expected, name)


def newest_step() -> int:
    found, _ = newest_checkpoint(RUN)
    assert found is not None
    return found.state.step
