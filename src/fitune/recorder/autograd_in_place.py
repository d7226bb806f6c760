"""Run in place, during a recording, what autograd runs in place without one.

PyTorch treats every tensor as one of a subclass while a dispatch mode is on, and every fake tensor
always (ATen/TensorSubclassLikeUtils.h). For such tensors, autograd does not write in place: where
two gradients of one tensor meet it allocates their sum (torch/csrc/autograd/input_buffer.cpp:
accumulate), and where a backward formula fills a tensor of zeros it allocates another one
(FunctionsManual.cpp, native/TensorAdvancedIndexing.cpp, native/ReduceOps.cpp). A recorder is such a
mode, so it would see more memory than the loop takes, unless it calls the in-place operators
itself.
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
#: operator -> its in-place variant
IN_PLACE = {
    _ADD: aten.add_.Tensor,
    aten.index_add.default: aten.index_add_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}


class Holders(NamedTuple):
    """The numbers of references to a tensor, counted inside a dispatch mode."""

    #: references to the C++ tensor
    tensor: int
    #: references to its storage
    storage: int
    #: references to its Python object
    python: int
    #: the Python function that called the mode. If autograd itself calls an operator, that is the
    #: function that started the backward; in the backward of a `torch.autograd.Function` or in a
    #: hook it is another
    engine: CodeType


def as_autograd_does(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, object],
    *,
    alone: Holders,
    is_new_zeros: Callable[[torch.Tensor], bool],
) -> Any:
    """Return the operator that autograd would have called without a recording.

    That is an in-place operator of `IN_PLACE`, or `func`, which must be one of its keys. Must be
    called by `__torch_dispatch__` itself, since its caller and its arguments are counted.

    alone: from `count_alone`.
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
    """Return whether the elements fill one block of memory without gaps or overlaps, in any order.

    This is is_non_overlapping_and_dense.
    """
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
    """Count the references to a gradient that only autograd holds.

    They are counted in a small backward, since each version of PyTorch counts in its own way. Must
    not be called inside an operator, where autograd is off.
    """
    found: list[Holders] = []

    class Counting(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Dynamo would wrap the mode, and the wrapper would be counted as the caller.
            return False

        def __torch_dispatch__(
            self,
            func: Any,
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            if func is _ADD:
                count_first_of(func, args)
            return func(*args, **(kwargs or {}))

    # As many variables refer to the tensor here as in `as_autograd_does`.
    def count_first_of(_: Any, args: Sequence[Any]) -> None:
        caller = sys._getframe(2).f_code
        first, _ = args[0], args[1]
        found.append(_count_holders(first, caller))

    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        ones = torch.ones(2, device="cpu", requires_grad=True)
        with Counting():  # type: ignore[no-untyped-call]
            (ones * ones).sum().backward()
    return found[0]
