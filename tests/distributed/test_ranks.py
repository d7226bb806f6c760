"""A run of two processes is the run of one, whatever happens to one of them, and ends in both or in none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from disturbed_run import weights, write_run
from faults import out_of_memory
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.data.rows import Batch, Row
from fitune.data.split_by_rank import split_by_rank
from fitune.errors import ModelError
from fitune.recovery import guard
from fitune.run.directory import RunDirectory, read_run
from fitune.run.journal import plan_parts, read_journal
from fitune.run.metrics import StepMetrics, read_events, read_metrics, read_summary
from fitune.step import work
from fitune.training import loop, prepare
from fitune.training.state import RunState
from tiny_ranks import run_ranks

TWO, ONE, RUN = (RunDirectory(Path("runs", name)) for name in ("two", "one", "run"))
STEPS, FAULTY_STEP = 6, 5
LOSSES = ("loss", "grad_norm")

T = TypeVar("T")
Fault = Callable[[], None]


def be_rank(arguments: tuple[str, ...], fault: Fault | None = None) -> int:
    """The exit code of `fitune train`. fault: prepared in the second process alone."""
    for prediction in ("choose_plan", "predict_second_step"):
        setattr(prepare, prediction, None)  # most of the time of so small a run, and no matter here
    if fault is not None and os.environ["RANK"] == "1":
        fault()
    return main(["train", *arguments])


def train(*arguments: str, fault: Fault | None = None, size: int = 2) -> list[int]:
    return run_ranks(be_rank, arguments, fault, size=size)


def _at_step(action: Callable[[], None]) -> None:
    """Done when the faulty step is told, in the process that calls this."""
    real = TrainingProgress.step

    def step(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == FAULTY_STEP:
            action()
        real(self, metrics, progress=progress)

    TrainingProgress.step = step  # type: ignore[method-assign]


def killed() -> None:
    _at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def told_to_end() -> None:
    _at_step(lambda: os.kill(os.getpid(), signal.SIGTERM))


def without_memory(num_failures: int = 10**6) -> None:
    """In the faulty step, so many times."""
    real_step, real_share = guard.safe_step, work.loss_share
    now, left = [0], [num_failures]

    def step(*arguments: Any, step: int, **options: Any) -> Any:
        now[0] = step
        return real_step(*arguments, step=step, **options)

    def share(*arguments: Any, **options: Any) -> torch.Tensor:
        if now[0] == FAULTY_STEP and left[0]:
            left[0] -= 1
            raise out_of_memory()
        return real_share(*arguments, **options)

    setattr(guard, "safe_step", step)  # noqa: B010
    setattr(work, "loss_share", share)  # noqa: B010


def without_memory_twice() -> None:
    without_memory(2)


def without_memory_for_the_update() -> None:
    """In the faulty step, in the optimizer."""
    real_step, real_update = guard.safe_step, torch.optim.AdamW.step
    now = [0]

    def step(*arguments: Any, step: int, **options: Any) -> Any:
        now[0] = step
        return real_step(*arguments, step=step, **options)

    def update(*arguments: Any, **options: Any) -> Any:
        if now[0] == FAULTY_STEP:
            raise out_of_memory()
        return real_update(*arguments, **options)

    setattr(guard, "safe_step", step)  # noqa: B010
    setattr(torch.optim.AdamW, "step", update)  # noqa: B010


def without_its_model() -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ModelError("tiny is not on this machine")

    setattr(prepare, "load_model", load)  # noqa: B010


def with_other_weights() -> None:
    real = prepare.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.001)
        return model

    setattr(prepare, "load_model", load)  # noqa: B010


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The current directory, with a run of two processes and one of one, both left alone."""
    directory = tmp_path_factory.mktemp("ranks")
    write_run(directory, steps=STEPS)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        assert train("sft.yaml", "run.name=two") == [0, 0], Path("1.err").read_text()
        (directory / "said").write_text(Path("1.out").read_text() + Path("1.err").read_text())
        assert train("sft.yaml", "run.name=one", size=1) == [0]
        yield directory


def assert_same(run: RunDirectory) -> None:
    """As the run of two processes that was left alone, bit for bit."""
    assert weights(run) == weights(TWO)
    assert read_journal(run.journal)[-1].hash == read_journal(TWO.journal)[-1].hash
    assert read_run(run.path).state == "finished"


def assert_close(run: RunDirectory, other: RunDirectory) -> None:
    mine, theirs = read_metrics(run.metrics), read_metrics(other.metrics)
    for name in LOSSES:
        expected = [getattr(step, name) for step in theirs.steps]
        assert [getattr(step, name) for step in mine.steps] == pytest.approx(expected, rel=1e-5)
    assert [e.eval_loss for e in mine.evals] == pytest.approx(
        [e.eval_loss for e in theirs.evals], rel=1e-5
    )
    assert [e.eval_tokens for e in mine.evals] == [e.eval_tokens for e in theirs.evals]
    expected_weights = load_file(other.last / "model.safetensors")
    for name, tensor in load_file(run.last / "model.safetensors").items():
        assert torch.allclose(tensor, expected_weights[name], atol=1e-4), name


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_every_row_is_dealt_once_and_no_part_is_heavier_than_the_mean_and_a_row(
    lengths: list[int], size: int
) -> None:
    rows = tuple(
        Row(number, *(2 * [torch.zeros(length).numpy()])) for number, length in enumerate(lengths)
    )
    parts = split_by_rank(Batch(rows), size)
    assert len(parts) == size
    assert sorted(row for part in parts for row in part.row_ids) == list(range(len(rows)))
    assert all(list(part.row_ids) == sorted(part.row_ids) for part in parts)
    assert max(part.num_tokens for part in parts) <= sum(lengths) / size + max(lengths, default=0)


def test_two_processes_have_the_losses_of_one() -> None:
    assert_close(TWO, ONE)
    for mine, theirs in zip(read_journal(TWO.journal), read_journal(ONE.journal), strict=True):
        assert (mine.ids_hash, mine.loss_weight, mine.lr) == (
            theirs.ids_hash,
            theirs.loss_weight,
            theirs.lr,
        )
        first, second = plan_parts(mine.plan)
        assert sorted(row for ids in (*first, *second) for row in ids) == sorted(
            r for ids in theirs.plan for r in ids
        )
        assert first
        assert second


def test_the_second_process_says_nothing(place: Path) -> None:
    assert (place / "said").read_text() == ""


def test_the_journal_of_two_processes_is_replayed_by_two() -> None:
    assert train("--replay", str(TWO.path)) == [0, 0], Path("0.err").read_text()
    (replayed,) = Path("runs").glob("two-replay-*")
    assert_same(RunDirectory(replayed))


def test_the_journal_of_two_processes_is_not_replayed_by_one() -> None:
    assert train("--replay", str(TWO.path), size=1) == [2]
    assert (
        "was done by 2 processes and cannot be replayed by 1: start 2" in Path("0.err").read_text()
    )


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on_bit_for_bit() -> None:
    assert train("sft.yaml", "run.name=killed", fault=killed) == [75, -signal.SIGKILL]
    assert "error: rank 0: another of the 2 processes is gone" in Path("0.err").read_text()
    run = RunDirectory(Path("runs/killed"))
    assert read_run(run.path).state == "failed"
    assert train("--resume", str(run.path)) == [0, 0], Path("0.err").read_text()
    assert_same(run)


def test_a_process_without_memory_for_a_row_ends_all_with_its_sentence_and_nothing_is_lost() -> (
    None
):
    assert train("sft.yaml", "run.name=full", fault=without_memory) == [4, 4]
    said = Path("0.err").read_text()
    assert "error: rank 1: no memory for 20.0 MiB in the forward of sample" in said
    assert f"the weights of step {FAULTY_STEP - 1} are in" in said
    run = RunDirectory(Path("runs/full"))
    assert read_summary(run.summary).steps == FAULTY_STEP - 1
    assert train("--resume", str(run.path)) == [0, 0], Path("0.err").read_text()
    assert_same(run)


def test_a_process_that_runs_out_of_memory_twice_changes_nothing_but_the_events() -> None:
    assert train("sft.yaml", "run.name=twice", fault=without_memory_twice) == [0, 0], Path(
        "0.err"
    ).read_text()
    run = RunDirectory(Path("runs/twice"))
    assert_close(run, TWO)
    told = [event.message for event in read_events(run.events) if event.kind == "out_of_memory"]
    assert [message.startswith("rank 1: out of memory in the forward") for message in told] == [
        True,
        True,
    ]


def test_an_update_without_memory_ends_all_and_the_run_goes_on_bit_for_bit() -> None:
    assert train("sft.yaml", "run.name=torn", fault=without_memory_for_the_update) == [75, 75]
    assert (
        "rank 1: out of memory in the middle of the optimizer's update" in Path("0.err").read_text()
    )
    run = RunDirectory(Path("runs/torn"))
    assert train("--resume", str(run.path)) == [0, 0], Path("0.err").read_text()
    assert_same(run)


def test_a_signal_to_one_process_stops_all_after_the_same_step() -> None:
    assert train("sft.yaml", "run.name=stopped", fault=told_to_end) == [128 + signal.SIGTERM] * 2
    run = RunDirectory(Path("runs/stopped"))
    summary = read_summary(run.summary)
    assert (summary.status, summary.steps) == ("stopped", FAULTY_STEP)
    assert Path("1.err").read_text() == ""
    assert train("--resume", str(run.path)) == [0, 0], Path("0.err").read_text()
    assert_same(run)


def test_one_process_goes_on_with_the_run_of_two_to_1e_5() -> None:
    assert train("sft.yaml", "run.name=fewer", fault=told_to_end) == [143, 143]
    run = RunDirectory(Path("runs/fewer"))
    assert train("--resume", str(run.path), size=1) == [0]
    assert "goes on to 1e-5, not bit for bit: batch.ranks 2 -> none" in Path("0.err").read_text()
    assert_close(run, ONE)


def test_what_one_process_cannot_load_ends_all_before_anything_is_written() -> None:
    assert train("sft.yaml", "run.name=absent", fault=without_its_model) == [2, 2]
    assert "error: rank 1: tiny is not on this machine" in Path("0.err").read_text()
    assert not (RUN.path.parent / "absent" / "config.yaml").exists()


def test_processes_with_different_weights_are_found_before_they_are_saved() -> None:
    assert train("sft.yaml", "run.name=differ", fault=with_other_weights) == [1, 1]
    assert "no longer have the same weights" in Path("0.err").read_text()
    assert list((RUN.path.parent / "differ" / "checkpoints").iterdir()) == []


def test_a_process_without_a_row_of_the_step_trains_along() -> None:
    assert train("sft.yaml", "run.name=sparse", "batch.effective=1", "train.steps=3") == [0, 0], (
        Path("0.err").read_text()
    )
    assert train("sft.yaml", "run.name=alone", "batch.effective=1", "train.steps=3", size=1) == [0]
    assert_close(RunDirectory(Path("runs/sparse")), RunDirectory(Path("runs/alone")))
    assert all(
        part[1] == ()
        for part in (
            plan_parts(line.plan) for line in read_journal(Path("runs/sparse/journal.jsonl"))
        )
    )


def test_an_incomplete_environment_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "sft.yaml"]) == 2
    assert (
        "error: WORLD_SIZE is 2 and RANK is not set: start with torchrun" in capsys.readouterr().err
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_that_comes_while_the_others_are_asked_counts_at_the_next_step() -> None:
    """The others have not heard of it yet, and go on."""
    caught: list[int] = []

    def exchange(own: T) -> list[T]:
        if not caught:
            caught.append(signal.SIGTERM)
        return [own, own]

    trainer: Any = SimpleNamespace(
        log=SimpleNamespace(take_unreported=tuple),
        state=RunState(),
        saver=SimpleNamespace(failed_step=None),
        ranks=SimpleNamespace(exchange=exchange),
    )
    assert not loop.TrainingLoop.agree_to_stop(trainer, caught, None)
    assert caught
    assert loop.TrainingLoop.agree_to_stop(trainer, caught, None)


@pytest.mark.thorough
def test_torchrun_ends_all_after_the_same_step_when_it_is_told_to_end() -> None:
    """As a scheduler does it: SIGTERM to torchrun, which sends it on."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fitune"]
    command = [
        sys.executable,
        *torchrun,
        "train",
        "sft.yaml",
        "run.name=torchrun",
        "train.steps=100000",
    ]
    source = str(Path(__file__).parents[2] / "src")
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        metrics = Path("runs/torchrun/metrics.jsonl")
        while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
            time.sleep(0.1)
        process.terminate()
        said = process.communicate(timeout=120)[1]
    assert "saved after step" in said, said
    run = RunDirectory(metrics.parent)
    summary = read_summary(run.summary)
    assert summary.status == "stopped"
    assert (
        json.loads(
            (next(iter(sorted(run.checkpoints.iterdir())[::-1])) / "state.json").read_text()
        )["state"]["step"]
        == summary.steps
    )
