"""Records what a training loop allocates and frees, step by step, without a GPU and without weights.

The model is built on the meta device, moved to fake CPU tensors (shapes and dtypes, no data) and trained for a few
steps by the loop's own code under a `Recorder`. With a CUDA target the process behaves as CUDA meanwhile. The same
recorder runs on real CPU tensors (mode="real"), which is how its truth is checked: the events are equal.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitune.errors import UsageError
from fitune.trace.assumptions import Assumptions, Routing
from fitune.trace.cuda_behaviour import CpuKernels, CudaKernels, CudaTarget, cuda_behaviour
from fitune.trace.events import MemoryTrace
from fitune.trace.placement import CARD, card_stands_in
from fitune.trace.recorder import Recorder

Build = Callable[[], nn.Module]
Step = Callable[[], Any]
Loop = Callable[[nn.Module, torch.device], Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """mode: "fake" needs neither memory nor data; "real" runs the loop on CPU tensors. target: the card that is
    recorded for, None for what the CPU itself does. routing: tokens per expert of a mixture of experts, spread evenly
    or all to the same experts. loader_warmup: transformers' `from_pretrained(device_map=...)` allocates and frees one
    block of the model's size first."""

    mode: Literal["fake", "real"] = "fake"
    target: CudaTarget | None = CudaTarget()
    num_steps: int = 3
    routing: Routing = "balanced"
    loader_warmup: bool = False


def record_loop(build: Build, loop: Loop, settings: RecordSettings = RecordSettings()) -> MemoryTrace:  # noqa: B008
    """Builds the model with `build()`, sets the loop up with `loop(model, device)` and records `num_steps` calls of
    the step that it returns. Raises UsageError for a real recording with a CUDA target."""
    fake = settings.mode == "fake"
    if not fake and settings.target is not None:
        raise UsageError("a recording on real CPU tensors cannot behave as CUDA: use mode='fake' or target=None")
    assumptions = Assumptions(settings.routing)
    kernels = (
        CpuKernels(assumptions.call) if settings.target is None else CudaKernels(settings.target, assumptions.call)
    )
    recorder = Recorder(kernels)
    with ExitStack() as stack:
        stack.enter_context(_collected_at_step_ends())
        if settings.target is not None:
            stack.enter_context(cuda_behaviour(settings.target))
        with torch.device("meta") if fake else nullcontext():
            model = build()
        if fake:
            stack.enter_context(_not_tracing())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            fill(model)
        if settings.loader_warmup:
            warmup = recorder.allocate(_model_bytes(model), "workspace", "loader warm-up")
            recorder.free(warmup)
        recorder.load(model)
        stack.enter_context(recorder.hooks())
        stack.enter_context(recorder)
        if settings.target is not None:
            stack.enter_context(card_stands_in(recorder))
        step = loop(model, CARD)
        recorder.load(model)
        for number in range(1, settings.num_steps + 1):
            gc.collect()
            recorder.begin_step(number)
            step()
            recorder.end_step(model)
        events = recorder.events()
    return MemoryTrace(events, (*_describe(settings), *assumptions.used))


def fill(model: nn.Module) -> None:
    """Puts the model's meta tensors on the CPU, in place: parameters, buffers and plain attributes. Inside
    FakeTensorMode they become fake. What was shared stays shared."""
    made: dict[int, torch.Tensor] = {}

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    keep = list(model.parameters()) + list(model.buffers())  # ids stay unique while these live
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = on_cpu(tensor)
    del keep


def _model_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def _describe(settings: RecordSettings) -> Iterator[str]:
    yield f"recorded {settings.num_steps} optimizer steps on {settings.mode} tensors"
    if settings.target is None:
        yield "kernels of this CPU"
    else:
        major, minor = settings.target.compute_capability
        yield f"kernels of CUDA, compute capability {major}.{minor}, attention {settings.target.attention}"


@contextmanager
def _collected_at_step_ends() -> Iterator[None]:
    """Reference cycles would die whenever Python's collector happens to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _not_tracing() -> Iterator[None]:
    """transformers takes other paths for fake tensors, as if it were compiled; here they stand for real ones."""
    try:
        from transformers.utils import import_utils
    except ImportError:
        yield
        return
    with patch.object(import_utils, "is_fake_tensor", lambda _: False):
        yield
