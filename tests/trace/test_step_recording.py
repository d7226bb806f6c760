"""Our own step on fake tensors allocates and frees what it does on real ones, event by event."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from fitune.config import RunConfig, read_config
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryTrace
from fitune.trace.own_step import Pass, longest_rows, record_step
from tiny_models import TINY

LENGTH = 24


@pytest.fixture
def config_directory(tmp_path: Path) -> Path:
    TINY["llama"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def make_config(directory: Path, *overrides: str) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"source": str(directory), "init": "random", "precision": "float32"},
        "data": {"train": "rows.jsonl", "max_length": LENGTH},
        "batch": {"micro": 2, "accumulation": 2},
    }
    return read_config(tree, overrides).config


def passes(config: RunConfig) -> list[Pass]:
    rows = longest_rows(config.data.max_length, num_rows=config.batch.rows_per_step)
    return [Pass("train", rows), Pass("eval", rows), Pass("train", rows)]


def steps(trace: MemoryTrace) -> list[tuple[object, ...]]:
    """Of the steps alone: when it loads, a model with data is asked for its logits, and one without is not."""
    events = [
        (e.num_bytes, e.category, e.phase, e.step, e.micro_batch, e.module, e.op)
        for e in trace.events
        if e.step > 0
    ]
    # what dies at one moment (autocast's copies of the weights) dies in the order of a hash table
    runs = groupby(events, key=lambda event: event[0] < 0)
    return [event for dead, run in runs for event in (sorted(run) if dead else run)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("batch.micro=4", "batch.accumulation=1"),
        ("data.packing=false",),
        ("loss=full",),
        ("model.recompute=full",),
        ("model.recompute=selective",),
        ("model.method=lora",),
        ("model.method=lora", "model.recompute=full", "model.precision=bfloat16"),
        ("model.precision=autocast_bfloat16",),
        ("optim.name=adamw_foreach",),
    ],
    ids=" ".join,
)
def test_a_fake_step_has_the_events_of_a_real_one(
    config_directory: Path, overrides: tuple[str, ...]
) -> None:
    config = make_config(config_directory, *overrides)
    fake = record_step(config, passes(config), target=None)
    real = record_step(config, passes(config), target=None, mode="real")
    assert len(steps(real.trace)) > 100
    assert steps(fake.trace) == steps(real.trace)


def test_packed_rows_for_a_card_are_one_variable_length_kernel(config_directory: Path) -> None:
    config = make_config(config_directory, "model.precision=autocast_bfloat16")
    recorded = record_step(config, passes(config), target=CudaTarget((8, 9)))
    assert recorded.layout.packed
    assert any("varlen" in event.op for event in recorded.trace.events)


def test_the_rows_are_copied_to_the_card_as_inputs(config_directory: Path) -> None:
    config = make_config(config_directory)
    recorded = record_step(config, passes(config), target=CudaTarget((8, 9)))
    ids_bytes = 2 * LENGTH * 8
    copied = [
        e
        for e in recorded.trace.events
        if e.step == 3 and e.category == "input" and e.num_bytes > 2 * ids_bytes
    ]
    assert len(copied) >= 2  # token ids, positions and targets of each micro-batch, in one piece


def test_the_optimizer_state_is_born_in_the_first_step_and_stays(config_directory: Path) -> None:
    config = make_config(config_directory)
    state = [
        e
        for e in record_step(config, passes(config), target=None).trace.events
        if e.category == "optimizer_state"
    ]
    assert {e.step for e in state if e.num_bytes > 0} == {1}
    assert not [e for e in state if e.num_bytes < 0]


def test_a_card_before_ampere_trains_in_float16_with_scaled_gradients(
    config_directory: Path,
) -> None:
    config = make_config(config_directory, "model.precision=auto")
    assert (
        record_step(config, passes(config), target=CudaTarget((7, 5))).precision.name
        == "autocast_float16"
    )
    assert (
        record_step(config, passes(config), target=CudaTarget((8, 0))).precision.name
        == "autocast_bfloat16"
    )


@pytest.mark.parametrize(
    ("target", "released"), [(CudaTarget(), True), (None, False)], ids=["card", "cpu"]
)
def test_a_card_s_cache_is_empty_once_the_state_is_made(
    config_directory: Path, target: CudaTarget | None, released: bool
) -> None:
    trace = record_step(make_config(config_directory), [Pass("state")], target=target).trace
    assert (trace.events[-1].op == "empty_cache") is released
