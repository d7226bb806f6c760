"""A run that is stopped anywhere goes on as if it had not been: the same bits, and logs without gap or repetition."""

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import StepMetrics, read_summary
from tiny_run import save_tiny_model, write_config, write_dialogues

RUN, UNDISTURBED = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/undisturbed"))
STEPS = 9
TIMES = {"seconds", "tokens_per_second", "device_used_bytes", "peak_allocated_bytes", "peak_reserved_bytes"}


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny_run")
    save_tiny_model(directory / "tiny")
    return directory


@pytest.fixture(autouse=True)
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with tiny/, sft.jsonl and sft.yaml, which is the current one."""
    monkeypatch.setenv("FITUNE_CACHE", str(shared / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    train = {"steps": STEPS, "save_every": 2, "eval_every": 3}
    write_config(tmp_path / "sft.yaml", {"train": train})
    return tmp_path


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
    for name in ("status", "steps", "tokens", "supervised_tokens", "train_loss", "eval_loss", "best_eval_loss"):
        assert getattr(summary, name) == getattr(expected, name)


KINDS = {
    "full": (),
    "lora": ("model.method=lora",),
    "lora with dropout": ("model.method=lora", "model.lora.dropout=0.3"),
    "bfloat16": ("model.precision=bfloat16",),
    "autocast": ("model.precision=autocast_bfloat16",),
    "padded": ("data.packing=false",),
    "no evaluation": ("data.eval_fraction=0", "train.eval_every=auto"),
    "in epochs": ("train.steps=null", "train.epochs=1.5"),
    "a mixture with weights": ("data.train=[{path: sft.jsonl, weight: 1.5}]",),
    "sgd": ("optim.name=sgd",),
    "adafactor": ("optim.name=adafactor",),
    "recomputed": ("model.recompute=full",),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sft.yaml", "run.name=undisturbed", *kind)
    train_until(5, "sft.yaml", *kind, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    if "data.eval_fraction=0" in kind:
        assert weights(RUN) == weights(UNDISTURBED)
    else:
        assert_same()
