"""Track what is known about the elements of tensors that have no data.

A loop may set a fake tensor's data (`provide_data`), or make it on the host (`card_stand_in`). Results
that are computed from known data alone are computed too. For other tensors, `Origin` describes what
their elements come from.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from fitune.recorder.data_traits import traits_of

#: Tensors with more elements are computed as shapes only: indices, lengths and masks are smaller,
#: and no branch depends on a batch of pixels
MOST_KNOWN_ELEMENTS = 2**20


#: An attribute of a storage of data into which something unknown was written
_OVERWRITTEN = "_fitune_overwritten"


@dataclass(slots=True)
class Router:
    """One topk over experts, of which a router chooses some for each token."""

    num_experts: int
    #: experts chosen for each token
    top_k: int
    #: choices in all, tokens times top_k
    num_slots: int
    #: how many more experts will be reported as chosen with the worst routing
    unseen: int
    #: experts whose tokens were counted
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known about a tensor's elements without their data."""

    #: the mean of the elements; None if unknown
    mean: float | None = None
    #: the router whose choice the elements come from
    router: Router | None = None
    #: whether each element counts the tokens of one expert
    is_count: bool = False


def origin_of(tensor: torch.Tensor) -> Origin | None:
    return getattr(tensor, "_fitune_origin", None)


def set_origin(tensor: torch.Tensor, origin: Origin) -> None:
    tensor._fitune_origin = origin  # type: ignore[attr-defined]


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Attach the data to a fake tensor.

    Operators that write into the tensor will write into this data too.
    """
    tensor._fitune_data = data  # type: ignore[attr-defined]


def forget_data(tensor: torch.Tensor) -> None:
    """Let nothing be known of a fake tensor's elements."""
    tensor.__dict__.pop("_fitune_data", None)


def set_factory_data(
    tensor: torch.Tensor, func: object, args: tuple[Any, ...], kwargs: dict[str, object]
) -> None:
    """Set the data of a tensor that the factory call `func(*args, **kwargs)` returned."""
    if (
        not has_no_data(tensor)
        or data_of(tensor) is not None
        or tensor.numel() > MOST_KNOWN_ELEMENTS
    ):
        return
    if not tree_any(
        lambda value: isinstance(value, torch.Tensor) and data_of(value) is None, (args, kwargs)
    ):
        with torch.no_grad():
            set_data(
                tensor, run_on_data(func, args, {**kwargs, "requires_grad": False, "device": "cpu"})
            )


def has_no_data(tensor: torch.Tensor) -> bool:
    """Return whether this is a fake or a meta tensor."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def data_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor's data, or None if it is unknown.

    A fake or meta tensor may have data attached; a CPU tensor is its own data.
    """
    if has_no_data(tensor):
        data: torch.Tensor | None = getattr(tensor, "_fitune_data", None)
        return None if data is None or hasattr(data.untyped_storage(), _OVERWRITTEN) else data
    return tensor if tensor.device.type == "cpu" else None


def is_known(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Return whether the arguments have tensors and the data of all these is known."""
    # For speed: nearly always the first tensor is unknown.
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if not isinstance(first, torch.Tensor) or data_of(first) is None:
        return False
    return not tree_any(
        lambda value: isinstance(value, torch.Tensor) and data_of(value) is None, (args, kwargs)
    )


def run_on_data(func: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """Run the operator on the data of its arguments, which must be known."""
    with _disable_current_modes():
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        result = func(
            *tree_map_only(torch.Tensor, data_of, args),
            **tree_map_only(torch.Tensor, data_of, kwargs),
        )
        if "empty" in func.__name__:
            # Uninitialised memory would make each prediction a different one.
            result.zero_()
    return result


def known_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return `tensor.numpy()`, or zeros where the data is not known."""
    data = data_of(tensor)
    with _disable_current_modes():
        return (
            torch.zeros(tensor.shape, dtype=tensor.dtype) if data is None else data.detach()
        ).numpy()


def compute_data(
    func: object, args: tuple[object, ...], kwargs: dict[str, object], result: object
) -> None:
    """Compute the results' data if the data of all input tensors is known.

    An operator that writes into its arguments also writes into their data. If what it writes is
    unknown, that data is forgotten.
    """
    is_mutable = traits_of(func).is_mutable
    known = bool(args) and is_known(args, kwargs)
    if not known and not is_mutable:
        return
    results = _tensors(result)
    written = _written(func, args) if is_mutable else []
    if not (results or written) or not all(map(has_no_data, results)):
        return
    for each in written:
        if (
            each.dtype == torch.bool
            and (origin := origin_of(each)) is not None
            and origin.router is None
        ):
            del each._fitune_origin  # type: ignore[attr-defined]
    if not known or sum(each.numel() for each in results) > MOST_KNOWN_ELEMENTS:
        for each in written:
            its = each.__dict__.pop("_fitune_data", None)
            # The tensor may be a view: then the data of all tensors on its storage is unknown too.
            if its is not None:
                setattr(its.untyped_storage(), _OVERWRITTEN, True)
        return
    data = _tensors(run_on_data(func, args, kwargs))
    for each, its in zip(results, data, strict=True) if not written else ():
        set_data(each, its)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _written(func: Any, args: tuple[object, ...]) -> list[torch.Tensor]:
    """Return the fake and meta tensors among the arguments that the operator writes into."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [
        each
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write
        for each in tree_leaves(value)
        if isinstance(each, torch.Tensor) and has_no_data(each)
    ]
