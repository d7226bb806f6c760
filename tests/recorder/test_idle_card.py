"""A recording never asks CUDA itself: it runs where the driver is missing, and leaves a card and its state alone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.utils.import_utils as transformers_imports
from torch import nn
from torch.utils.checkpoint import DefaultDeviceType, checkpoint

import fitune
from cuda_stand_in import cuda_build
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.record import RecordSettings, record_loop

Step = Callable[[], Any]


@pytest.fixture(params=[None, 0, 1], ids=["cpu build", "no driver", "a card"])
def called(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    if request.param is None:
        yield []
        return
    with cuda_build(num_cards=request.param) as names:
        yield names
        assert names == []


def record(do: Callable[[], Any]) -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        return do

    record_loop(lambda: nn.Linear(4, 4), loop, RecordSettings(target=CudaTarget(), num_steps=1))


def predicted(**model: Any) -> int | None:
    config = {
        "model": {"source": "minimind2-small", "init": "random", **model},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "batch": {"micro": 1, "effective": 2},
    }
    return fitune.predict(config, gpu="RTX 4090").peak_allocated_bytes


@pytest.mark.parametrize(
    "model", [{"method": "full", "recompute": "full"}, {"method": "lora", "recompute": "off"}]
)
def test_a_cuda_build_predicts_what_a_cpu_build_does(model: dict[str, Any]) -> None:
    expected = predicted(**model)
    for num_cards in (0, 1):
        with cuda_build(num_cards=num_cards) as names:
            assert predicted(**model) == expected
        assert names == []


CALLS: dict[str, Callable[[], Any]] = {
    "seeds": lambda: (
        torch.manual_seed(1),
        torch.cuda.manual_seed(1),
        torch.cuda.manual_seed_all(1),
        torch.seed(),
    ),
    "random states": lambda: torch.cuda.set_rng_state(torch.cuda.get_rng_state()),
    "all random states": lambda: torch.cuda.set_rng_state_all(
        torch.cuda.random.get_rng_state_all()
    ),
    "initial seed": lambda: torch.cuda.initial_seed(),
    "init": lambda: (torch.cuda.init(), torch.cuda._lazy_init(), torch.cuda.is_initialized()),
    "devices": lambda: (
        torch.cuda.set_device(0),
        torch.cuda.current_device(),
        torch.cuda.can_device_access_peer(0, 0),
    ),
    "memory": lambda: (
        torch.cuda.memory.memory_allocated(),
        torch.cuda.memory.mem_get_info(),
        torch.cuda.memory_stats(),
    ),
    "memory of the accelerator": lambda: (
        torch.accelerator.memory_allocated(),
        torch.accelerator.reset_peak_memory_stats(),
        torch.accelerator.empty_cache(),
    ),
    "accelerator": lambda: (
        torch.accelerator.current_device_index(),
        torch.accelerator.set_device_index(0),
        torch.accelerator.synchronize(),
        torch.accelerator.current_stream().is_capturing(),
        torch.accelerator.device_count(),
    ),
    "synchronise": lambda: (
        torch.cuda.synchronize(),
        torch.cuda.current_stream().synchronize(),
        torch.cuda.ipc_collect(),
    ),
    "events": lambda: (torch.cuda.Event(enable_timing=True).record(), torch.Event("cuda").query()),
    "profiler": lambda: torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart()),
    "history": lambda: torch.cuda.memory._record_memory_history(max_entries=10),
    "debugging": lambda: torch.cuda.set_sync_debug_mode("warn"),
    "snapshot": lambda: torch.cuda.memory._snapshot(),
    "capture": lambda: torch.cuda.is_current_stream_capturing(),
}


@pytest.mark.parametrize("do", CALLS.values(), ids=CALLS)
def test_nothing_that_a_loop_asks_reaches_cuda(do: Callable[[], Any], called: list[str]) -> None:
    record(do)


def test_streams_and_device_guards_of_a_loop_reach_no_cuda(called: list[str]) -> None:
    def step() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.cuda.device(0):
            torch.ones(4, device="cuda").record_stream(side)
        side.record_event().wait()

    record(step)


def test_checkpointing_keeps_random_numbers_without_cuda(called: list[str]) -> None:
    def step() -> None:
        x = torch.ones(4, 4, device="cuda", requires_grad=True)
        for use_reentrant in (False, True):
            checkpoint(lambda x: x.sin().cos(), x, use_reentrant=use_reentrant).sum().backward()
        with torch.random.fork_rng():
            torch.manual_seed(1)

    record(step)


def test_an_optimizer_looks_for_graph_capture_without_cuda(called: list[str]) -> None:
    def step() -> None:
        weight = torch.ones(4, device="cuda", requires_grad=True)
        weight.grad = torch.ones(4, device="cuda")
        torch.optim.AdamW([weight]).step()

    record(step)


def test_the_random_numbers_of_the_card_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator()
    before = stream.manual_seed(7).get_state()
    monkeypatch.setattr(torch.cuda, "default_generators", (stream,))
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    with cuda_build(num_cards=1) as names:
        record(lambda: torch.manual_seed(1))
        predicted(method="lora", recompute="off")
    assert names == []
    assert torch.equal(stream.get_state(), before)


def test_what_is_seeded_when_cuda_starts_stays_as_it_was() -> None:
    with cuda_build(num_cards=1):
        torch.manual_seed(7)
        before = torch.cuda._lazy_seed_tracker.get_calls()
        predicted(method="lora", recompute="off")
        assert torch.cuda._lazy_seed_tracker.get_calls() == before


def test_what_libraries_remember_of_the_device_is_not_the_recordings_answer() -> None:
    record(
        lambda: (
            transformers_imports.is_torch_cuda_available(),
            DefaultDeviceType.get_device_type(),
        )
    )
    assert transformers_imports.is_torch_cuda_available() == torch.cuda.is_available()
    assert DefaultDeviceType.get_device_type() != "cuda" or torch.cuda.is_available()
