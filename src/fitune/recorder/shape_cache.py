"""Runs operators on fake tensors, and remembers the results by the shapes of the arguments.

A training step calls the same operators with the same shapes over and over. FakeTensorMode has a
cache of its own, but its keys cover symbolic shapes and devices that do not occur here, and take
three quarters of a recording's time. A result of this cache is compared with that of FakeTensorMode
the first time, down to the dispatch keys. What cannot be imitated is left to FakeTensorMode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fitune.recorder.operator_cost import Operator
from fitune.recorder.operators import by_operator

_CPU = torch.device("cpu")
#: Makes the result of an operator from its arguments.
_Make = Callable[[tuple[object, ...]], Any]
#: Tags of operators whose result depends on more than the shapes of the arguments.
_NOT_BY_SHAPE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
_NOT_REMEMBERED = {
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift.default,
    torch.ops.aten.lift_fresh_copy.default,
}


@by_operator
def _is_by_shape(func: Operator) -> bool:
    return func not in _NOT_REMEMBERED and not any(tag in func.tags for tag in _NOT_BY_SHAPE)


class _CannotRememberError(Exception):
    """The arguments cannot be part of a key."""


@dataclass(slots=True, eq=False)
class Call:
    """What is remembered of the calls of an operator with arguments of the same shapes."""

    #: held here because its id is part of the key
    func: Operator
    #: makes the result, None where FakeTensorMode has to
    make: _Make | None
    #: the bytes that it moves and its floating-point operations, once they were counted
    work: tuple[int, int] | None = None


class ShapeMemory:
    """The results of operators by the shapes of their arguments.

    It serves any number of recordings for the same target.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._attributes: dict[str, object] = {}

    def serve(self, mode: FakeTensorMode) -> None:
        """Make fake tensors of `mode` from now on."""
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(0, device="meta")
        self._attributes |= FakeTensor(mode, empty, _CPU).__dict__

    def call(
        self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, object]
    ) -> tuple[Any, Call | None]:
        """Return the operator's result, and the memory of such calls, None without one."""
        if not _is_by_shape(func):
            return func(*args, **kwargs), None
        # an operator may return what it is given by name, as its `out`
        values = (*args, *kwargs.values())
        try:
            key = id(func), *kwargs, len(args), *_key(values), _num_distinct(values)
            known = self._calls.get(key)
        # TypeError: an argument is not hashable
        except (_CannotRememberError, TypeError):
            return func(*args, **kwargs), None
        if known is None:
            result = func(*args, **kwargs)
            known = self._calls[key] = Call(func, self._imitate(func, values, result))
            return result, known
        return func(*args, **kwargs) if known.make is None else known.make(values), known

    def _imitate(self, func: Operator, args: tuple[Any, ...], result: object) -> _Make | None:
        """Return how to make such a result from such arguments, None if it cannot be imitated."""
        if result is None:
            return lambda _: None
        if isinstance(result, FakeTensor):
            return self._output(args, result)
        if not isinstance(result, (tuple, list)) or not all(
            isinstance(each, FakeTensor) for each in result
        ):
            return None
        storages = {each.untyped_storage()._cdata for each in result}
        if len(storages) != len(result) and not func.is_view:
            return None
        makes = [self._output(args, each) for each in result]
        if any(make is None for make in makes):
            return None
        kind = type(result)
        return lambda args: kind(make(args) for make in makes if make is not None)

    def _output(self, args: tuple[Any, ...], result: FakeTensor) -> _Make | None:
        """Return how to make one output, None if it differs from that of FakeTensorMode."""
        for position, value in enumerate(args):
            if value is result:
                return lambda args: args[position]
        make = self._tensor(args, result)
        if make is None or result.constant is not None or result.is_conj() or result.is_neg():
            return None
        made = make(args)
        same_dispatch = torch._C._dispatch_key_set(made) == torch._C._dispatch_key_set(result)
        same_bytes = made.untyped_storage().nbytes() == result.untyped_storage().nbytes()
        same = same_dispatch and _key((made,)) == _key((result,)) and same_bytes
        return make if same else None

    def _tensor(self, args: tuple[Any, ...], result: FakeTensor) -> _Make | None:
        """Return how to make a tensor as a view of an argument, or with a storage of its own."""
        attributes, shape, stride = self._attributes, tuple(result.shape), result.stride()
        offset, dtype = result.storage_offset(), result.dtype
        storage = result.untyped_storage()._cdata
        base = next(
            (
                i
                for i, value in enumerate(args)
                if isinstance(value, Tensor) and value.untyped_storage()._cdata == storage
            ),
            None,
        )

        def make(args: tuple[Any, ...]) -> Tensor:
            with torch._C._DisableTorchDispatch():
                if base is None:
                    empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                else:
                    empty = torch.empty(0, dtype=dtype, device="meta")
                    empty.set_(args[base].untyped_storage(), offset, shape, stride)
            made = Tensor._make_subclass(
                FakeTensor,
                empty,
                False,
                dispatch_device=True,
                device_for_backend_keys=_CPU,
            )
            torch._C._set_throw_on_mutable_data_ptr(made)
            made.__dict__.update(attributes)
            return made

        return make


def _key(values: Any) -> list[object]:
    """Return what the result of a call depends on.

    Raises _CannotRememberError for real tensors, and for fake ones with a known value or on the meta
    device.
    """
    key: list[object] = []
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None or value.fake_device.type == "meta":
                raise _CannotRememberError
            stride = value.stride()
            # the bytes that a broadcast tensor really holds
            held = value.untyped_storage().nbytes() if 0 in stride else None
            key.append((value.shape, stride, value.storage_offset(), value.dtype, held))
        elif isinstance(value, Tensor):
            raise _CannotRememberError
        elif isinstance(value, (list, tuple)):
            key.append(tuple(_key(value)))
        else:
            key.append((type(value), value))
    return key


def _num_distinct(values: tuple[Any, ...]) -> int:
    """Return the number of different tensors among the arguments: one may occur twice."""
    return len({id(value) for value in values if isinstance(value, FakeTensor)})
