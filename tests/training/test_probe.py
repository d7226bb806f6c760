"""`train.probe`: settings are tried from the same state on the same rows, and the run is that of the chosen one."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from disturbed_run import predict_nothing
from fitune.batch_size.scaling import OptimSettings, scale
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.config import read_config
from fitune.run.directory import RunDirectory
from fitune.run.interval import ConfidenceInterval
from fitune.run.journal import read_journal
from fitune.run.metrics import StepMetrics, read_events, read_metrics, read_summary
from fitune.run.probe import Branch, Probe, choose
from fitune.step.assemble import Setup
from fitune.training import probe as probe_module
from tiny_run import save_tiny_model, write_config, write_dialogues

RUN, PLAIN = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/plain"))
LOW, GOOD = "optim.lr=2e-5", "optim.lr=0.01"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("probe")
    save_tiny_model(directory / "tiny")
    write_dialogues(directory / "sft.jsonl", 120)
    write_config(
        directory / "sft.yaml",
        {
            "train": {
                "epochs": 1,
                "save_every": 2,
                "eval_every": 3,
                "probe_fraction": 0.3,
                "probe": True,
            },
            "batch": {"effective": 4, "micro": 2},
        },
    )
    with pytest.MonkeyPatch.context() as patched:
        predict_nothing(patched)
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        patched.chdir(directory)
        assert main(["train", "sft.yaml", LOW, "run.name=probed"]) == 0
        yield directory


@pytest.fixture(autouse=True)
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    for name in ("sft.jsonl", "sft.yaml"):
        shutil.copy2(shared / name, name)


@pytest.fixture
def probed(shared: Path) -> RunDirectory:
    """A run that began with far too low a rate."""
    shutil.copytree(shared / "runs" / "probed", RUN.path)
    return RUN


def found(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run.probe.read_text())
    return content


def test_a_rate_that_is_far_too_low_is_raised(probed: RunDirectory) -> None:
    content = found(probed)
    assert content["branches"][content["chosen"]]["name"] == "twice the rate"
    assert max(line.lr for line in read_journal(probed.journal)) == pytest.approx(4e-5, rel=0.02)


def test_every_branch_sees_the_same_tokens(probed: RunDirectory) -> None:
    branches = found(probed)["branches"]
    assert len({branch["tokens"] for branch in branches}) == 1
    assert [branch["steps"] for branch in branches] == [8, 8, 8, 4]


def test_the_chosen_branch_counts_as_the_run_and_the_others_as_the_probes_cost(
    probed: RunDirectory,
) -> None:
    content = found(probed)
    assert content["cost_tokens"] == 3 * content["branches"][0]["tokens"]
    steps = read_metrics(probed.metrics).steps
    assert read_summary(probed.summary).tokens == sum(step.tokens for step in steps)
    assert not probed.branches.exists()


def test_the_noise_is_measured_before_training(probed: RunDirectory) -> None:
    content = found(probed)
    assert content["noise_low_rows"] <= content["noise_scale_rows"]


def test_the_outcome_is_among_the_events_that_a_report_shows(probed: RunDirectory) -> None:
    messages = [event.message for event in read_events(probed.events) if event.kind == "probe"]
    assert len(messages) == 5
    assert (
        "twice the rate is better by more than chance: the run goes on with rate 4e-05"
        in messages[-1]
    )


def test_a_probed_run_is_the_run_of_its_chosen_setting_bit_for_bit(probed: RunDirectory) -> None:
    assert main(["train", str(probed.config), "run.name=plain"]) == 0
    assert read_journal(probed.journal)[-1].hash == read_journal(PLAIN.journal)[-1].hash
    assert (probed.last / "model.safetensors").read_bytes() == (
        PLAIN.last / "model.safetensors"
    ).read_bytes()
    assert [each.eval_loss for each in read_metrics(probed.metrics).evals] == [
        each.eval_loss for each in read_metrics(PLAIN.metrics).evals
    ]


def test_a_probed_run_is_replayed_bit_for_bit(probed: RunDirectory) -> None:
    assert main(["train", "--replay", str(probed.path)]) == 0


@pytest.mark.parametrize("setting", range(1, len(probe_module.SETTINGS)))
def test_whatever_is_chosen_the_configuration_that_is_kept_trains_the_same(
    setting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "chosen", setting)
    monkeypatch.setattr(
        "fitune.training.probe.choose", lambda branches: min(setting, len(branches) - 1)
    )
    assert main(["train", "sft.yaml", GOOD]) == 0
    assert main(["train", str(RUN.config), "run.name=plain"]) == 0
    assert read_journal(RUN.journal)[-1].hash == read_journal(PLAIN.journal)[-1].hash


def test_a_scaled_rate_is_kept_as_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "chosen", 3)
    monkeypatch.setattr("fitune.training.probe.choose", lambda branches: len(branches) - 1)
    assert main(["train", "sft.yaml", GOOD, "optim.scaling=sqrt", "optim.reference_batch=1"]) == 0
    assert main(["train", str(RUN.config), "run.name=plain"]) == 0
    assert read_journal(RUN.journal)[-1].hash == read_journal(PLAIN.journal)[-1].hash


@pytest.mark.parametrize("step", [3, 11])
def test_a_run_that_is_killed_in_the_probe_or_after_it_ends_as_if_it_had_not_been(
    step: int, probed: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed.path.rename(PLAIN.path)

    def die(self: object, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(probe_module.Watchers if step == 3 else TrainingProgress, "step", die)
        with pytest.raises(Killed):
            main(["train", "sft.yaml", LOW])
    assert main(["train", "--resume", "runs/run"]) == 0
    assert read_journal(RUN.journal)[-1].hash == read_journal(PLAIN.journal)[-1].hash
    assert found(RUN)["chosen"] == found(PLAIN)["chosen"]


@pytest.mark.parametrize(
    "killed_in", ["fitune.training.session.write_probe", "fitune.training.probe.go_on"]
)
def test_a_run_that_is_killed_while_the_branch_becomes_the_run_ends_the_same(
    killed_in: str, probed: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed.path.rename(PLAIN.path)

    def die(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(killed_in, die)
        with pytest.raises(Killed):
            main(["train", "sft.yaml", LOW])
    assert main(["train", "--resume", "runs/run"]) == 0
    assert read_journal(RUN.journal)[-1].hash == read_journal(PLAIN.journal)[-1].hash


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.epochs=null", "train.steps=40"], "train.steps says nothing of the run's length"),
        (["optim.warmup=0.4"], "before any rate is tried at its height"),
        (["data.eval_fraction=0", "train.eval_every=auto"], "compares on held-out samples"),
        (["train.probe=false"], "train.probe_fraction has no effect"),
        (["train.probe_fraction=0.05"], "a probe needs 8: set it to 0."),
        (["data.eval_fraction=0.02"], "are too few"),
    ],
)
def test_a_probe_that_cannot_tell_is_refused_and_leaves_no_trace(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft.yaml", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not RUN.path.exists()


def test_the_flag_is_for_runs_that_begin(
    probed: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--probe", "--resume", str(probed.path)]) == 2
    assert "--probe begins a run" in capsys.readouterr().err


def test_twice_the_batch_takes_the_whole_rule_and_keeps_its_micro_batches() -> None:
    optim = OptimSettings(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, clip=1.0)
    sections = {"batch": {"micro": 2, "accumulation": 3}, "train": {"probe": True}}
    config = read_config(
        {"model": {"source": "tiny"}, "data": {"train": "sft.jsonl"}, **sections}
    ).config
    changed, own, keys = probe_module.apply_setting(
        config, cast(Setup, SimpleNamespace(optim=optim)), probe_module.SETTINGS[3]
    )
    assert own == replace(scale(optim, "sqrt", factor=2), lr=pytest.approx(1e-3 * math.sqrt(2)))
    assert (own.betas[1], own.weight_decay) == (
        pytest.approx(0.999**2),
        pytest.approx(0.1 * math.sqrt(2)),
    )
    assert (changed.batch.rows_per_step, changed.batch.micro_rows) == (12, 2)
    assert {"optim.betas", "optim.weight_decay", "batch.effective", "train.probe"} <= set(keys)


def branch(loss: float, low: float | None = None, high: float | None = None) -> Branch:
    difference = (
        None if low is None or high is None else ConfidenceInterval((low + high) / 2, low, high, 50)
    )
    return Branch(
        name=f"at {loss}",
        lr=1e-3,
        rows=8,
        steps=10,
        tokens=1000,
        seconds=1.0,
        eval_loss=loss,
        difference=difference,
    )


@pytest.mark.parametrize(
    ("branches", "chosen", "words"),
    [
        ([branch(2.0), branch(1.9, -0.2, 0.1), branch(2.1, 0.05, 0.2)], 0, "no difference found"),
        (
            [branch(2.0), branch(1.9, -0.2, -0.1), branch(1.8, -0.3, -0.1)],
            2,
            "at 1.8 is better by more than chance",
        ),
        ([branch(2.0), branch(2.1, 0.05, 0.2)], 0, "the configuration is better"),
        ([branch(float("inf")), branch(2.0), branch(1.9)], 2, "did not diverge"),
        ([branch(2.0), branch(float("inf"))], 0, "the configuration is better"),
    ],
)
def test_only_what_is_better_by_more_than_chance_is_chosen(
    branches: list[Branch], chosen: int, words: str
) -> None:
    assert choose(branches) == chosen
    probe = Probe(
        noise_scale_rows=None, noise_low_rows=None, noise_high_rows=None, branches=tuple(branches)
    )
    assert words in probe.verdict
