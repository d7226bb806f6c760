"""Techniques that move memory to the host are seen by the prediction, which runs the same step."""

from pathlib import Path

import pytest

from fitune.config import RunConfig, read_config
from fitune.errors import ConfigError
from fitune.memory.timeline import Peak, timeline
from fitune.trace.cuda_behaviour import CudaTarget
from fitune.trace.step import Pass, longest_rows, record_step
from tiny_models import TINY

LENGTH, ROWS = 64, 4
CARD = CudaTarget((8, 9))


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


def steady_peak(directory: Path, *overrides: str, target: CudaTarget | None = CARD) -> Peak:
    config = make_config(directory, *overrides)
    passes = [Pass("train", longest_rows(config, num_rows=ROWS))] * 2
    return timeline(record_step(config, passes, target=target).trace).last_step_peak


def test_state_on_the_host_takes_no_memory_of_the_card(directory: Path) -> None:
    there, here = steady_peak(directory, "optim.name=adamw_host"), steady_peak(directory)
    assert here.categories["optimizer_state"] > 0
    assert there.categories["optimizer_state"] < 100  # the count of steps, a number for each parameter
    assert here.categories["parameter"] == there.categories["parameter"]


def test_offloaded_inputs_of_layers_leave_the_card(directory: Path) -> None:
    kept = steady_peak(directory, "model.recompute=full")
    moved = steady_peak(directory, "model.recompute=full", "model.offload_activations=true")
    hidden_bytes = ROWS * LENGTH * TINY["llama"].hidden_size * 4
    saved_bytes = kept.num_bytes - moved.num_bytes
    assert hidden_bytes * (TINY["llama"].num_hidden_layers - 1) <= saved_bytes
    assert saved_bytes <= 1.1 * hidden_bytes * TINY["llama"].num_hidden_layers


def test_offloading_is_refused_on_a_cpu(directory: Path) -> None:
    with pytest.raises(ConfigError, match="where they are on a CPU"):
        steady_peak(directory, "model.recompute=full", "model.offload_activations=true", target=None)


def test_offloading_without_recompute_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"no effect while model\.recompute is auto"):
        make_config(directory, "model.offload_activations=true")


def test_a_row_that_is_attended_to_in_pieces_has_the_same_peak_on_fake_tensors(directory: Path) -> None:
    config = make_config(directory, "data.max_length=256")
    passes = [Pass("train", longest_rows(config, num_rows=ROWS))] * 2
    fake, real = (record_step(config, passes, target=None, mode=mode) for mode in ("fake", "real"))
    assert timeline(fake.trace).last_step_peak.num_bytes == timeline(real.trace).last_step_peak.num_bytes
    assert any("flash_attention" in event.op for event in fake.trace.events)
