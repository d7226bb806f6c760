"""Adds two gradients of one tensor as autograd does without a recorder.

Where two gradients of one tensor meet, autograd adds the second to the first in place if nothing else holds the first.
Under a dispatch mode, and with fake tensors, it does not: it takes every tensor for one of a subclass
(torch/csrc/autograd/input_buffer.cpp: accumulate, can_accumulate_inplace; ATen/TensorSubclassLikeUtils.h), and allocates
a third tensor. So a recorder, which is such a mode, has to carry the sum out in place itself.
"""

import sys
from collections.abc import Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_ADD = torch.ops.aten.add.Tensor
_ADD_IN_PLACE = torch.ops.aten.add_.Tensor


class Holders(NamedTuple):
    """How often a tensor is referred to, as seen from a dispatch mode. engine: the Python code that called the mode,
    which is the one that started the backward where autograd itself calls an operator."""

    tensor: int
    storage: int
    python: int
    engine: CodeType


def as_autograd_adds(func: Any, args: Sequence[Any], kwargs: dict[str, Any], *, alone: Holders) -> Any:
    """`func`, or the operator in place that autograd would have called for these arguments.

    Called by `__torch_dispatch__` itself, whose caller and arguments are counted. alone: as `count_alone` found.
    """
    if func is not _ADD or torch.is_grad_enabled() or kwargs or torch._C._current_graph_task_id() == -1:
        return func
    frame = sys._getframe(2)
    if frame.f_code is not alone.engine:
        return func  # the backward of a torch.autograd.Function, or a hook
    first, second = args
    is_alone = _count_holders(first, frame.f_code) == alone
    is_plain = first.layout == torch.strided and second.layout == torch.strided
    return _ADD_IN_PLACE if is_alone and is_plain and _is_dense(first) else func


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order (is_non_overlapping_and_dense)."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _count_holders(tensor: torch.Tensor, caller: CodeType) -> Holders:
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return Holders(tensor._use_count(), storage, sys.getrefcount(tensor), caller)


@cache
def count_alone() -> Holders:
    """Counts the holders of a gradient that only autograd holds: in a backward, since each version of PyTorch counts in
    its own way. Not to be called inside an operator, where autograd is off."""
    found: list[Holders] = []

    class Counting(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # else the mode would be called through a wrapper, unlike the recorder

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD:
                count_as_called(args)
            return func(*args, **(kwargs or {}))

    def count_as_called(args: Sequence[Any]) -> None:  # as deep as `as_autograd_adds`
        first, _ = args
        found.append(_count_holders(first, sys._getframe(2).f_code))

    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        ones = torch.ones(2, device="cpu", requires_grad=True)
        with Counting():
            (ones * ones).sum().backward()
    return found[0]
