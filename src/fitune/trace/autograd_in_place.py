"""Carries out in place what autograd carries out in place where nothing records it.

PyTorch takes every tensor for one of a subclass while a dispatch mode is on, and every fake tensor always
(ATen/TensorSubclassLikeUtils.h). For those, autograd writes into no tensor: where two gradients of one tensor meet it
allocates their sum (torch/csrc/autograd/input_buffer.cpp: accumulate), and where a formula of a backward fills a tensor
of zeros it allocates another one (FunctionsManual.cpp, native/TensorAdvancedIndexing.cpp, native/ReduceOps.cpp). A
recorder is such a mode, so it would see more memory than the loop takes, unless it calls the operators in place itself.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
_ADD = aten.add.Tensor
IN_PLACE = {
    _ADD: aten.add_.Tensor,
    aten.index_add.default: aten.index_add_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}


class Holders(NamedTuple):
    """How often a tensor is referred to, as counted inside a dispatch mode.

    engine: the Python function that called the mode. Where autograd itself calls an operator, it is the one that
    started the backward; in the backward of a `torch.autograd.Function` or in a hook it is another.
    """

    tensor: int
    storage: int
    python: int
    engine: CodeType


def as_autograd_does(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    alone: Holders,
    is_new_zeros: Callable[[torch.Tensor], bool],
) -> Any:
    """Returns the operator of `IN_PLACE` that autograd would have called instead of `func` for these arguments, or
    `func`, which is one of its keys.

    It is to be called by `__torch_dispatch__` itself, whose caller and arguments it counts. alone: from `count_alone`.
    is_new_zeros: whether a tensor's memory was allocated by an operator that makes zeros.
    """
    if kwargs or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return func
    caller = sys._getframe(2).f_code
    if caller is not alone.engine:
        return func
    first, second = args[0], args[1]
    if func is not _ADD:
        return IN_PLACE[func] if is_new_zeros(first) else func
    if _count_holders(first, caller) != alone:
        return func
    is_plain = first.layout == torch.strided and second.layout == torch.strided and _is_dense(first)
    return IN_PLACE[_ADD] if is_plain else func


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order (is_non_overlapping_and_dense)."""
    expected = 1
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _count_holders(tensor: torch.Tensor, caller: CodeType) -> Holders:
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    num_tensor: int = tensor._use_count()  # type: ignore[attr-defined]
    return Holders(num_tensor, storage, sys.getrefcount(tensor), caller)


@cache
def count_alone() -> Holders:
    """Counts the holders of a gradient that only autograd holds: in a small backward, since each version of PyTorch
    counts in its own way. Not to be called inside an operator, where autograd is off."""
    found: list[Holders] = []

    class Counting(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # a wrapper around the mode would be the caller that is counted

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD:
                count_first_of(func, args)
            return func(*args, **(kwargs or {}))

    def count_first_of(_: Any, args: Sequence[Any]) -> None:  # the same variables refer to it as in `as_autograd_does`
        caller = sys._getframe(2).f_code
        first, _ = args[0], args[1]
        found.append(_count_holders(first, caller))

    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        ones = torch.ones(2, device="cpu", requires_grad=True)
        with Counting():  # type: ignore[no-untyped-call]
            (ones * ones).sum().backward()
    return found[0]
