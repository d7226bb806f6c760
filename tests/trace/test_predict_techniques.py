"""Techniques that move memory to the host are seen by the prediction, which runs the same step."""

from collections import Counter
from pathlib import Path

import pytest

from fitune.allocator.peaks import Peak, step_peaks
from fitune.config import RunConfig, read_config
from fitune.errors import ConfigError
from fitune.planning.cost import ADAMW_OP, update_on_host, work_of
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import ON_HOST, TRANSFER
from fitune.trace.own_step import Pass, RecordedStep, longest_rows, record_step
from tiny_models import TINY

LENGTH, ROWS = 64, 4
CARD = CudaTarget((8, 9))
NUM_LAYERS = TINY["llama"].num_hidden_layers
HIDDEN_BYTES = ROWS * LENGTH * TINY["llama"].hidden_size * 4


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    TINY["llama"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def make_config(directory: Path, *overrides: str) -> RunConfig:
    tree = {
        "model": {"source": str(directory), "init": "random", "precision": "float32"},
        "data": {"train": "rows.jsonl", "max_length": LENGTH},
        "batch": {"effective": ROWS, "micro": ROWS},
    }
    return read_config(tree, overrides).config


def record(directory: Path, *overrides: str, target: CudaTarget | None = CARD) -> RecordedStep:
    config = make_config(directory, *overrides)
    return record_step(
        config,
        [Pass("train", longest_rows(config.data.max_length, num_rows=ROWS))] * 2,
        target=target,
    )


def steady_peak(directory: Path, *overrides: str, target: CudaTarget | None = CARD) -> Peak:
    return step_peaks(record(directory, *overrides, target=target).trace, [2])[2]


def transfers(recorded: RecordedStep) -> Counter[str]:
    """Bytes between card and host in the last step, by phase."""
    found: Counter[str] = Counter()
    for work in recorded.work:
        if work.op == TRANSFER and work.step == 2:
            found[work.phase] += work.num_bytes
    return found


def test_state_on_the_host_takes_no_memory_of_the_card(directory: Path) -> None:
    there, here = steady_peak(directory, "optim.name=adamw_host"), steady_peak(directory)
    assert here.categories["optimizer_state"] > 0
    assert (
        there.categories["optimizer_state"] < 100
    )  # the count of steps, a number for each parameter
    assert here.categories["parameter"] == there.categories["parameter"]


def test_offloaded_inputs_of_layers_leave_the_card(directory: Path) -> None:
    kept = steady_peak(directory, "model.recompute=full")
    moved = steady_peak(directory, "model.recompute=full", "model.offload_activations=true")
    saved_bytes = kept.categories["activation"] - moved.categories["activation"]
    assert saved_bytes == HIDDEN_BYTES * (
        NUM_LAYERS - 1
    )  # that of the layer which recomputes has come back


def test_what_crosses_to_the_host_and_back_is_told_apart(directory: Path) -> None:
    crossing = transfers(
        record(directory, "model.recompute=full", "model.offload_activations=true")
    )
    inputs = transfers(record(directory, "model.recompute=full"))
    assert (
        crossing["forward"] - inputs["forward"] == crossing["backward"] == NUM_LAYERS * HIDDEN_BYTES
    )
    assert inputs["backward"] == inputs["optimizer"] == 0


def test_an_update_on_the_host_is_that_of_the_card_moved(directory: Path) -> None:
    """A plan prices the one from a recording of the other."""
    steps = [record(directory, name) for name in ("optim.name=adamw_host", "optim.name=adamw")]
    there, here = (
        work_of(step.work, rows=[(LENGTH, LENGTH - 1)] * ROWS, packed=True).update for step in steps
    )
    recorded, derived = (
        {
            work.op: (work.num_bytes, work.dtype)
            for work in update
            if work.op in (TRANSFER, f"{ON_HOST}{ADAMW_OP}")
        }
        for update in (there, update_on_host(here))
    )
    assert recorded == derived
    assert recorded[TRANSFER][0] == 12 * steps[0].num_trainable_parameters


def test_offloading_is_refused_on_a_cpu(directory: Path) -> None:
    with pytest.raises(ConfigError, match="where they are on a CPU"):
        steady_peak(
            directory, "model.recompute=full", "model.offload_activations=true", target=None
        )


def test_offloading_without_recompute_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"no effect while model\.recompute is auto"):
        make_config(directory, "model.offload_activations=true")


def test_a_row_that_is_attended_to_in_pieces_has_the_same_peak_on_fake_tensors(
    directory: Path,
) -> None:
    config = make_config(directory, "data.max_length=256")
    passes = [Pass("train", longest_rows(config.data.max_length, num_rows=ROWS))] * 2
    fake, real = (record_step(config, passes, target=None, mode=mode) for mode in ("fake", "real"))
    on_fake, on_real = (step_peaks(each.trace, [2])[2].num_bytes for each in (fake, real))
    assert on_fake == on_real
    assert any("flash_attention" in event.op for event in fake.trace.events)
