"""Which errors mean that memory ran out, and what is made before it can run out."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from faults import out_of_memory
from fitune.config import OptimConfig
from fitune.errors import OutOfMemoryError
from fitune.machine.out_of_memory import memory_failure, needed_bytes, release_workspaces, try_twice
from fitune.step.optimizer import build_optimizer
from fitune.step.optimizer_state import create_state

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(
            "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 8.00 GiB total capacity)"
        ),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: cudaErrorMemoryAllocation"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
    ],
    ids=str,
)
def test_running_out_of_device_memory_is_known_by_its_words(error: Exception) -> None:
    assert memory_failure(error) == "device"


def test_torch_says_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory_failure(caught.value) == "device"
    assert needed_bytes(caught.value) == 4 * 2**50


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("out of resource: shared memory, Required: 147456"),
        ValueError("the word processor is out of memory"),
        KeyError("exp_avg_sq"),
        OutOfMemoryError("row 3 does not fit"),
    ],
    ids=repr,
)
def test_anything_else_is_not_taken_for_it(error: Exception) -> None:
    assert memory_failure(error) is None


def raised_from(error: Exception, cause: Exception, *, said: bool) -> Exception:
    try:
        try:
            raise cause
        except Exception as first:
            if said:
                raise error from first
            raise error  # noqa: B904 (the context is what is tested)
    except Exception as caught:
        return caught


@pytest.mark.parametrize("said", [True, False], ids=["cause", "context"])
def test_it_is_found_behind_the_error_of_a_library(said: bool) -> None:
    wrapped = raised_from(ValueError("a layer failed"), out_of_memory(), said=said)
    assert memory_failure(wrapped) == "device"
    assert needed_bytes(wrapped) == 20 * 2**20


def test_a_context_that_was_cut_off_is_not_looked_at() -> None:
    wrapped = raised_from(ValueError("a layer failed"), out_of_memory(), said=False)
    wrapped.__suppress_context__ = True
    assert memory_failure(wrapped) is None


def test_nothing_is_retried_after_an_illegal_access_whatever_else_is_said() -> None:
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert memory_failure(raised_from(out_of_memory(), illegal, said=True)) is None


def test_the_hosts_own_memory_is_told_apart() -> None:
    assert memory_failure(MemoryError()) == "host"


def test_what_cannot_be_cut_is_tried_twice() -> None:
    tries: list[int] = []

    def action(succeeds_at: int) -> str:
        tries.append(0)
        if len(tries) < succeeds_at:
            raise out_of_memory()
        return "done"

    assert try_twice(lambda: action(2), device=CPU, what="it") == "done"
    tries.clear()
    with pytest.raises(OutOfMemoryError, match=r"^it found no memory \(20\.0 MiB at once\)"):
        try_twice(lambda: action(3), device=CPU, what="it")
    assert len(tries) == 2


NAMES = ["adamw", "adamw_foreach", "adafactor", "muon", "apollo", "apollo_mini", "sgd"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    return model


def bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


@pytest.mark.parametrize("name", NAMES)
def test_making_the_optimizers_state_moves_no_bit_now_or_later(name: str) -> None:
    settings = OptimConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    model, plain = small_model(), small_model()
    optimizer = build_optimizer(model, settings, lr=0.1, device=torch.device("cpu"))
    before = bits(model)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert create_state(optimizer)
    assert bits(model) == before
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == rates
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(optimizer.state[parameter] for parameter in model.parameters())
    assert trained(model, optimizer) == trained(
        plain, build_optimizer(plain, settings, lr=0.1, device=torch.device("cpu"))
    )


@pytest.mark.parametrize("failing_call", range(6))
def test_state_that_found_no_memory_half_way_is_completed_the_second_time(
    failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own way leaves KeyError: 'exp_avg_sq' for the next update."""
    model, settings = small_model(), OptimConfig()
    optimizer = build_optimizer(model, settings, lr=0.1, device=torch.device("cpu"))
    calls, zeros_like = itertools.count(), torch.zeros_like

    def failing_once(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(calls) == failing_call:
            raise out_of_memory()
        return zeros_like(*arguments, **options)

    before = bits(model)
    monkeypatch.setattr(torch, "zeros_like", failing_once)
    with pytest.raises(torch.OutOfMemoryError):
        create_state(optimizer)
    assert bits(model) == before
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert create_state(optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}
    assert all("exp_avg_sq" in state for state in optimizer.state.values())


def test_state_is_not_made_for_an_optimizer_whose_beginning_is_unknown() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    assert not create_state(torch.optim.RMSprop(model.parameters()))
    assert not create_state(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_a_card_is_left_with_what_tensors_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("workspaces"), raising=False
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cached blocks"))
    release_workspaces(torch.device("cuda"))
    assert done == ["workspaces", "cached blocks"]
