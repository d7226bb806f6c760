"""Running out of memory on purpose, at a named place of the step, on the calls that are asked for."""

import itertools
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from fitune.recovery import attempt as module

PLACES = (
    "forward of layer 0", "forward of layer 1", "loss", "backward of layer 1", "backward of layer 0",
    "after backward", "clip", "update",
)  # fmt: skip


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 24 GiB in total."
    )


@dataclass
class Fault:
    """Raises when it is reached for the times whose numbers, from 0, are in `calls`."""

    calls: frozenset[int]
    error: Callable[[], BaseException] = out_of_memory
    counter: Iterator[int] = field(default_factory=itertools.count)

    def reach(self) -> None:
        if next(self.counter) in self.calls:
            raise self.error()


@contextmanager
def failing(model: nn.Module, place: str, *calls: int, **options: Any) -> Iterator[Fault]:
    """While this holds, `place` runs out of memory on those of its calls."""
    fault = Fault(frozenset(calls), **options)
    layers = next(
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 2
    )
    with ExitStack() as stack:
        if place.startswith("forward"):
            handle = layers[int(place[-1])].register_forward_pre_hook(lambda *_: fault.reach())
            stack.callback(handle.remove)
        elif place.startswith("backward"):
            handle = layers[int(place[-1])].register_forward_hook(
                lambda *seen: _fail_in_backward(seen[-1], fault)
            )
            stack.callback(handle.remove)
        else:
            target, name, before = {
                "loss": ("fitune.objectives.supervised.Supervised", "loss_sum", False),
                "after backward": ("fitune.step.step", "backward", False),
                "commit": ("fitune.step.gradients.CommitBuffer", "add", True),
                "sum": ("fitune.step.gradients.CommitBuffer", "filled", True),
                "clip": ("torch.nn.utils", "clip_grad_norm_", True),
                "update": ("torch.optim.AdamW", "step", False),
                "evaluation": ("fitune.objectives.supervised.Supervised", "evaluate", False),
            }[place]
            stack.enter_context(_patched(f"{target}.{name}", fault, before=before))
        yield fault


@contextmanager
def failing_call(target: str, *calls: int, before: bool = True, **options: Any) -> Iterator[Fault]:
    """While this holds, the function of that dotted name fails on those of its calls."""
    fault = Fault(frozenset(calls), **options)
    with _patched(target, fault, before=before):
        yield fault


def _fail_in_backward(output: Any, fault: Fault) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    if tensor.requires_grad:
        tensor.register_hook(lambda _: fault.reach())


def _patched(target: str, fault: Fault, *, before: bool) -> Any:
    """The function runs out of memory before it does anything, or after it has done all that it does: an update is then
    as torn as can be."""
    owner_name, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    real = getattr(owner, name)

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if before:
            fault.reach()
        result = real(*arguments, **options)
        if not before:
            fault.reach()
        return result

    return mock.patch.object(owner, name, wrapper)


@contextmanager
def proving_release(model: nn.Module) -> Iterator[list[int]]:
    """Each time that memory is given back, all that the layers put out must be gone, and every gradient in `.grad`.
    Yields the number of outputs that were looked at, at each release."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    released: list[int] = []

    def remember(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    def release(_: torch.device) -> None:
        alive = [tensor for ref in outputs if (tensor := ref()) is not None]
        assert not alive, f"{len(alive)} of {len(outputs)} outputs live on"
        assert all(parameter.grad is None for parameter in model.parameters())
        released.append(len(outputs))

    layers = next(
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 2
    )
    handles = [layer.register_forward_hook(remember) for layer in layers]
    with mock.patch.object(module, "release_memory", release):
        yield released
    for handle in handles:
        handle.remove()
