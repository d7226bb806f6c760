"""A recording sees the same sums of gradients, in place or not, as the profiler sees without a recorder."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fitune.recorder.record import Loop, RecordSettings, record_loop

NUM_BYTES = 32 * 64 * 4
"""Of the tensor in which gradients meet; nothing else in these loops has as many."""


def build() -> nn.Module:
    return nn.Linear(8, 64, bias=False)


def loop_of(loss: Callable[[Tensor], Tensor]) -> Loop:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
        rows = torch.zeros(32, 8, device=device)

        def step() -> None:
            model.weight.grad = None
            loss(model(rows)).backward()

        return step

    return loop


def with_a_kept_gradient(y: Tensor) -> Tensor:
    kept: list[Tensor] = []
    twice = y * 2
    twice.register_hook(kept.append)
    return (twice.cos() + twice.exp()).sum() + y.sin().sum()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "two uses": lambda y: y.cos().sum() + y.exp().sum(),
    "three uses": lambda y: y.cos().sum() + y.exp().sum() + y.tanh().sum(),
    "a residual": lambda y: (y + y.exp()).tanh().sum(),
    "a square": lambda y: (y * y).sum(),
    "views of both": lambda y: y.view(64, 32).exp().sum() + y.view(16, 128).cos().sum(),
    "an expanded gradient": lambda y: y.exp().sum() + y.sum(),
    "transposed": lambda y: y.t().exp().sum() + y.exp().t().sum(),
    "rows one by one": lambda y: y[0].exp().sum() + y[1].exp().sum() + y[2].exp().sum(),
    "a hook that keeps the gradient": with_a_kept_gradient,
    "rows by index": lambda y: y.index_select(0, torch.tensor([1, 2])).sum() + y.exp().sum(),
    "gathered elements": lambda y: (
        y.gather(1, torch.zeros(32, 1, dtype=torch.long)).sum() + y.exp().sum()
    ),
    "a largest element": lambda y: y.max(dim=1).values.sum() + y.exp().sum(),
}


def sums_recorded(loss: Callable[[Tensor], Tensor], mode: Literal["fake", "real"]) -> int:
    """How many tensors the recording sees allocated in the backward, of the size of those where gradients meet."""
    trace = record_loop(build, loop_of(loss), RecordSettings(mode=mode, num_steps=1))
    return sum(event.num_bytes == NUM_BYTES and event.phase == "backward" for event in trace.events)


def sums_allocated(loss: Callable[[Tensor], Tensor]) -> int:
    """The same without a recorder, as PyTorch's profiler sees the CPU's allocator."""
    step = loop_of(loss)(build(), torch.device("cpu"))
    with (
        warnings.catch_warnings(action="ignore"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        step()
    assert seen.profiler is not None
    events = list(seen.profiler.kineto_results.events())
    begin = min(
        event.start_ns()
        for event in events
        if event.name().startswith("autograd::engine::evaluate_function")
    )
    sizes = Counter(
        event.nbytes()
        for event in events
        if event.name() == "[memory]" and event.start_ns() >= begin
    )
    return sizes[NUM_BYTES]


@pytest.mark.parametrize("mode", ["fake", "real"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_meet_in_as_many_tensors_as_without_a_recorder(
    name: str, mode: Literal["fake", "real"]
) -> None:
    assert sums_recorded(LOSSES[name], mode) == sums_allocated(LOSSES[name])


def test_a_sum_in_the_backward_of_a_function_stays_out_of_place() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            (gradient,) = gradients
            return gradient.exp() + gradient

    def loss(y: Tensor) -> Tensor:
        out: Tensor = Twice.apply(y)
        return out.exp().sum()

    assert (
        sums_recorded(loss, "fake") == sums_allocated(loss) == 3
    )  # exp's gradient, exp and the sum
