"""Describes operators to the recorder: their traits, their names and the rule of their kernel."""

from functools import cache
from typing import Any, NamedTuple

import torch

from fitune.recorder.autograd_in_place import IN_PLACE
from fitune.recorder.operator_cost import Operator
from fitune.recorder.operators import by_operator
from fitune.recorder.recording import Rule

_LIFT_FRESH = torch.ops.aten.lift_fresh.default
#: A view although its schema does not say so, because autograd need not know: it moves nothing.
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


class Traits(NamedTuple):
    """Properties of an operator that are the same for all of its calls."""

    #: with its overload, such as aten.add.Tensor
    name: str
    #: without the overload, such as aten.add
    packet_name: str
    #: whether the operator only informs a profiler
    is_profiler_mark: bool
    #: whether the operator launches a kernel, which a view does not
    does_work: bool
    #: whether autograd may have called the variant that works in place instead
    may_be_in_place: bool
    #: whether the operator makes a tensor of a Python number, as when one is written into a slice
    is_of_host: bool


@by_operator
def traits_of(func: Operator) -> Traits:
    does_work = not func.is_view and func is not _UNSAFE_VIEW
    return Traits(
        str(func),
        str(func.overloadpacket),
        func.namespace == "profiler",
        does_work,
        func in IN_PLACE,
        func is _LIFT_FRESH,
    )


@cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_MOST_IN_A_LIST = 4


def rule_of(func: Operator, args: tuple[Any, ...], *, total: int) -> Rule | None:
    """Return the rule for the kernel's temporaries, as a function of the shapes of the arguments.

    Returns None where many tensors arrive in one list, as those of an optimizer do.
    """
    if any(isinstance(value, (list, tuple)) and len(value) > _MOST_IN_A_LIST for value in args):
        return None
    return Rule(func.name(), tuple(_shape(value) for value in args), 0, total)


def _shape(value: Any) -> object:
    """Replace tensors by their shape and dtype, in the form that `temporaries_by_shape` reads."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape), value.dtype
        offset = value.storage_offset()
        return shape if not offset and value.is_contiguous() else (*shape, value.stride(), offset)
    return tuple(_shape(each) for each in value) if isinstance(value, (list, tuple)) else value
