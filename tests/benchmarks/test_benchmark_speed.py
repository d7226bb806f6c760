"""The benchmark of speed, small: the trainers that it compares learn the same, and its table says what was measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

import speed
import speed_where
from fitune.data.rows import Batch, Row
from fitune.model.load import build_model
from speed_trainers import TRAINERS, Outcome, Task, row_lengths, run_fitune, run_padding
from tiny_models import TINY_LLAMA
from tiny_run import save_tiny_model

STEPS, ROWS = 6, 4


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        model=str(save_tiny_model(tmp_path)), max_length=48, rows_per_step=ROWS, num_steps=STEPS
    )


def rows() -> list[Row]:
    random = np.random.default_rng(0)
    made = []
    for number in range(ROWS * STEPS):
        length = int(random.integers(5, 48))
        weights = (np.arange(length) > length // 3).astype(np.float32)
        made.append(Row(number, random.integers(3, 60, length, dtype=np.int32), weights))
    return made


def test_packing_has_the_loss_curve_of_padding(task: Task) -> None:
    ours, padded = run_fitune(task, rows()), run_padding(task, rows())
    assert len(ours.losses) == STEPS
    assert ours.losses == pytest.approx(padded.losses, abs=1e-4)
    assert ours.losses[0] != pytest.approx(ours.losses[-1], abs=1e-4)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_trl_has_the_same_loss_curve(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("speed_trainers._tokenizer_source", lambda: task.model)
    ours = run_fitune(task, rows()).losses
    for name in ("TRL, float32", "TRL, padding-free"):
        assert TRAINERS[name](task, rows()).losses == pytest.approx(ours, abs=1e-4), name


def test_the_lengths_are_log_normal_with_a_mean_of_250() -> None:
    lengths = row_lengths(Task(model="any", max_length=100_000, rows_per_step=500, num_steps=4))
    assert np.mean(lengths) == pytest.approx(250, rel=0.02)
    assert np.median(lengths) == pytest.approx(250 * np.exp(-(0.9**2) / 2), rel=0.02)
    assert max(row_lengths(Task(model="any", max_length=768))) <= 768


def test_the_table_has_the_ratios() -> None:
    def outcome(cpu_seconds: float, peak_bytes: int) -> list[Outcome]:
        return [
            Outcome(
                tokens=1000,
                cpu_seconds=cpu_seconds,
                wall_seconds=cpu_seconds,
                peak_bytes=peak_bytes,
                losses=[2.0],
            )
        ]

    entry = speed.entry(
        Task(model="any", max_length=768),
        {"fitune": outcome(2.0, 10**8), "padding to max_length": outcome(8.0, 5 * 10**8)},
    )
    assert "| padding to max_length | 125 | 125 | 500 | 2.00000 | x 4.00 | 20% |" in speed.render(
        [entry]
    )


def test_rounds_alternate_and_results_are_kept_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_apart(task: Task, trainer: str) -> Outcome | None:
        asked.append(trainer)
        return (
            None
            if trainer == "b"
            else Outcome(tokens=1, cpu_seconds=1, wall_seconds=1, peak_bytes=1, losses=[0.0])
        )

    monkeypatch.setattr(speed, "run_apart", run_apart)
    found = [
        {name: len(each) for name, each in outcomes.items()}
        for outcomes in speed.compare(Task(model="any", max_length=8), ["a", "b", "c"], rounds=2)
    ]
    assert asked == ["a", "b", "c"] * 2
    assert found == [{"a": 1}, {"a": 1, "c": 1}, {"a": 2, "c": 1}, {"a": 2, "c": 2}]


def test_a_trainer_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.run_apart(Task(model="nowhere/nothing", max_length=768), "fitune") is None
    assert "fitune: failed" in capsys.readouterr().err


def test_the_useful_work_is_what_torch_counts() -> None:
    """For one row without padding, all supervised: torch counts the products of the layers and of the head."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(TINY_LLAMA, attention="eager")
    ids = torch.arange(3, 35)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    batch = Batch((Row(0, np.arange(32, dtype=np.int32), np.ones(32, np.float32)),))
    # eager attention multiplies the whole square of 32 x 32, and the first layer's input needs a gradient too
    square = 3 * 2 * 2 * 32 * (32 * 32 - 32 * 33 / 2) * TINY_LLAMA.num_hidden_layers
    assert speed_where.useful_flops(model, batch) + square == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_the_parts_are_nearly_the_whole_step(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_where, "dialogue_rows", lambda _: rows())
    where = speed_where.measure(task)
    assert 0 < where.own_work_fraction <= 1
    assert where.waited_seconds < where.wall_seconds
    assert where.tokens == sum(map(len, rows()))
    assert where.peak_seconds > 0
    assert where.probed_seconds > 0
    assert "aten::mm" in where.operators
