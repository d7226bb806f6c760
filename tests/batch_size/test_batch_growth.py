"""A run whose effective batch grows does so at a commit, remembers it, and is replayed bit for bit."""

from pathlib import Path

import pytest
import torch

from disturbed_run import predict_nothing
from fitune.batch_size.growth import rescale_memory
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.recovery.guard import Guard
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import StepMetrics, read_events, read_metrics
from tiny_run import save_tiny_model, write_config, write_dialogues

RUN, WHOLE = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/whole"))
ANNEAL = ("train.batch_mode=anneal", "optim.schedule=cosine")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("growth")
    save_tiny_model(directory / "tiny")
    return directory


@pytest.fixture(autouse=True)
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_nothing(monkeypatch)
    monkeypatch.setenv("FITUNE_CACHE", str(shared / "cache"))
    monkeypatch.setattr("fitune.batch_size.growth.LEAST_STEPS_LEFT", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    write_dialogues(tmp_path / "sft.jsonl", 120)
    batch = {"effective": 4, "micro": 2}
    write_config(tmp_path / "sft.yaml", {"train": {"epochs": 1, "save_every": 2}, "batch": batch})


def steps(run: RunDirectory) -> tuple[StepMetrics, ...]:
    return read_metrics(run.metrics).steps


def test_each_step_tells_the_noise_that_was_measured_so_far() -> None:
    assert main(["train", "sft.yaml"]) == 0
    last = steps(RUN)[-1]
    assert last.noise_signal is not None
    assert last.noise_variance is not None
    assert last.noise_bounce is not None or last.noise_signal <= 0


def test_anneal_doubles_the_batch_where_the_schedule_has_halved_and_sees_every_row_once() -> None:
    assert main(["train", "sft.yaml", *ANNEAL]) == 0
    lines = read_journal(RUN.journal)
    rows = [sum(map(len, line.plan)) for line in lines]
    assert rows[0] == 4
    assert 8 in rows
    assert sorted(row for line in lines for part in line.plan for row in part) == sorted(
        {row for line in lines for part in line.plan for row in part}
    )
    (event, *_) = [event for event in read_events(RUN.events) if event.kind == "batch"]
    assert event.message.startswith(
        "effective batch 4 -> 8 samples, the schedule has halved the rate"
    )
    at = rows.index(8)
    assert lines[at].lr > lines[at - 1].lr


def test_a_change_reaches_adams_memory_its_settings_and_the_clipping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rescaled: list[tuple[torch.optim.Optimizer, float]] = []
    clips: list[float] = []

    def rescale(optimizer: torch.optim.Optimizer, *, gain: float) -> None:
        rescaled.append((optimizer, gain))
        rescale_memory(optimizer, gain=gain)

    monkeypatch.setattr("fitune.training.growth.rescale_memory", rescale)
    monkeypatch.setattr(Guard, "set_clip", lambda guard, clip: clips.append(clip))
    assert main(["train", "sft.yaml", *ANNEAL]) == 0
    num_changes = sum(event.kind == "batch" for event in read_events(RUN.events))
    assert num_changes >= 1
    assert [gain for _, gain in rescaled] == [2.0] * num_changes
    group = rescaled[-1][0].param_groups[0]
    assert group["betas"][1] == pytest.approx(0.999**2**num_changes)
    assert clips == pytest.approx([2 ** (-n / 2) for n in range(1, num_changes + 1)])


def test_advise_is_bit_for_bit_a_run_without_any_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["train", "sft.yaml"]) == 0
    monkeypatch.setattr("fitune.training.loop.NormRecorder", lambda *args, **options: None)
    assert main(["train", "sft.yaml", "run.name=whole"]) == 0
    assert (RUN.last / "model.safetensors").read_bytes() == (
        WHOLE.last / "model.safetensors"
    ).read_bytes()
    assert steps(WHOLE)[-1].noise_signal is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_around_a_change_ends_as_if_it_had_not_been(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "sft.yaml", *ANNEAL, "run.name=whole"]) == 0
    rows = [sum(map(len, line.plan)) for line in read_journal(WHOLE.journal)]
    step = rows.index(8) + (0 if when == "before" else 3)

    def die(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "step", die)
        with pytest.raises(Killed):
            main(["train", "sft.yaml", *ANNEAL])
    assert main(["train", "--resume", "runs/run"]) == 0
    assert read_journal(RUN.journal)[-1].hash == read_journal(WHOLE.journal)[-1].hash
    assert (RUN.last / "model.safetensors").read_bytes() == (
        WHOLE.last / "model.safetensors"
    ).read_bytes()


def test_a_replay_grows_where_the_run_did() -> None:
    assert main(["train", "sft.yaml", *ANNEAL]) == 0
    assert main(["train", "--replay", "runs/run"]) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.scaling=sqrt_gain"], "needs optim.reference_batch"),
        (
            ["optim.reference_batch=6"],
            "optim.reference_batch has no effect while optim.scaling is none",
        ),
        (
            ["train.batch_mode=follow", "train.epochs=null", "train.steps=9"],
            "train.steps says nothing",
        ),
        (
            ["train.batch_mode=anneal", "optim.schedule=constant"],
            "has no effect while optim.schedule is constant",
        ),
        (["train.batch_mode=folow"], "folow"),
    ],
)
def test_settings_without_effect_are_refused(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft.yaml", *overrides]) == 2
    assert words in capsys.readouterr().err


def test_a_reference_batch_carries_the_rate_over(capsys: pytest.CaptureFixture[str]) -> None:
    scaling = (
        "optim.scaling=sqrt_gain",
        "optim.reference_batch=1",
        "optim.noise_scale=2",
        "optim.schedule=constant",
    )
    assert main(["train", "sft.yaml", *scaling, "optim.warmup=0", "optim.lr=0.001"]) == 0
    assert (
        "sqrt_gain from 1 sample to 4, noise scale 2 samples: rate 0.001 -> 0.00141"
        in capsys.readouterr().err
    )
    assert steps(RUN)[-1].lr == pytest.approx(0.001 * (3 / 1.5) ** 0.5)
