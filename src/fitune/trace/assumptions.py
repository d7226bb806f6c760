"""What a recording assumes where a loop asks for data that fake tensors do not have.

A branch, a count or a shape that depends on data gets an answer from what is known about the tensor's origin: a sum of
ones is a count, indices made by topk are a router's choice, `isfinite` is true. Each kind of answer that was used is
named once in `MemoryTrace.source`. Where the data is known, because a loop told it (`tell_data`) or made it on the host
(`placement`), what is computed from that alone is computed, and nothing is assumed.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from fitune.config import Routing
from fitune.errors import UsageError
from fitune.trace.events import ROUTED, UNROUTED
from fitune.trace.operators import by_operator
from fitune.trace.patience import Patience
from fitune.trace.shape_cache import Call, ShapeMemory

aten = torch.ops.aten


@dataclass(slots=True)
class _Router:
    """One topk over experts: `num_experts` choices, `top_k` of them a token, `num_slots` in all; `unseen`: experts yet
    to be asked for; `num_counted`: those whose tokens were counted."""

    num_experts: int
    top_k: int
    num_slots: int
    unseen: int
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class _Origin:
    """The mean of the elements as far as it is known, and the router that they come from. is_count: whether each counts
    the tokens of one expert."""

    mean: float | None = None
    router: _Router | None = None
    is_count: bool = False


_SAME_ELEMENTS = {
    packet
    for name in [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "expand",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "lift_fresh",
        "copy",
        "contiguous",
        "flatten",
        "max",
        "amax",
        "min",
        "amin",
        "unbind",
        "split",
    ]
    if (packet := getattr(aten, name, None)) is not None
}
_TRUTH = {aten.isfinite: 1.0, aten.isnan: 0.0, aten.isinf: 0.0, aten.isin: 0.0, aten.all: 1.0, aten.ne: 1.0}

_DECIDED_BY = {aten.bitwise_or: 1.0, aten.logical_or: 1.0, aten.bitwise_and: 0.0, aten.logical_and: 0.0}
"""The element that decides alone: generation is over where it is long enough, whatever its tokens are."""

MOST_KNOWN_ELEMENTS = 2**20
"""Larger tensors are computed as shapes alone: indices, lengths and masks are smaller, and a batch of pixels decides
nothing."""


_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_SPECIAL = {
    *_INDEXING,
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._grouped_mm, aten.equal),
    aten.histc,
}
_TELL_ORIGIN = {
    *(_SAME_ELEMENTS | _TRUTH.keys() | _DECIDED_BY.keys()),
    *(
        aten.mul,
        aten.topk,
        aten._amp_foreach_non_finite_check_and_unscale_,
        aten.full,
        aten.scatter_,
        aten.scatter,
        aten.eq,
    ),
    *(aten.sum, aten.count_nonzero, aten.any, aten.gt, aten.ge, aten.logical_not, aten.bitwise_not),
}


class _Traits(NamedTuple):
    """Of an operator: whether it is not carried out as it is, whether something can be known of its result's elements
    without their data, whether it writes into its arguments, whether it cannot do without their data, and whether it
    makes a tensor that stores what is not zero."""

    is_special: bool
    tells_origin: bool
    is_mutable: bool
    needs_data: bool
    is_sparse: bool


@by_operator
def _traits(func: Any) -> _Traits:
    packet = func.overloadpacket
    needs_data = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)
    needs_data &= packet not in _INDEXING  # without masks, which are replaced
    is_sparse = _MAKES_SPARSE.search(func._schema.name) is not None
    return _Traits(packet in _SPECIAL, packet in _TELL_ORIGIN, func._schema.is_mutable, needs_data, is_sparse)


_MAKES_SPARSE = re.compile(r"sparse_(coo|csr|csc|bsr|bsc|compressed)_tensor|::_?to_sparse")
_SPARSE = (
    "makes a sparse tensor, whose memory is not predicted (nn.Embedding with sparse=True makes them, and so do PEFT's "
    "SHiRA and FRoD): predict the loop with dense tensors in their place, which need more, or another tuner"
)
_NO_DATA = (DataDependentOutputException, DynamicOutputShapeException)


def tell_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """The values that a fake tensor of a batch stands for: a mask without padding, the places of packed rows."""
    with _disable_current_modes():
        _tell(tensor, data.clone())


def _tell(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Operators that write into the tensor write into `data`."""
    tensor._fitune_data = data  # type: ignore[attr-defined]


def tell_made(tensor: torch.Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As `tell_data`, of a tensor that came from the factory call `func(*args, **kwargs)`."""
    if not _has_no_data(tensor) or _data(tensor) is not None or tensor.numel() > MOST_KNOWN_ELEMENTS:
        return
    if not tree_any(lambda value: isinstance(value, torch.Tensor) and _data(value) is None, (args, kwargs)):
        with torch.no_grad():
            _tell(tensor, _on_data(func, args, {**kwargs, "requires_grad": False, "device": "cpu"}))


class Assumptions:
    """Carries out operators, real or fake, and answers for the data where there is none."""

    def __init__(self, routing: Routing, shapes: ShapeMemory, patience: Patience | None = None) -> None:
        self._routing = routing
        self._shapes = shapes
        self.used: dict[str, None] = {}
        self.patience = patience or Patience()

    def lines(self) -> list[str]:
        """What was assumed. Of the worst routing, where it was wanted, also that it made no difference."""
        idle = self._routing == "worst" and ROUTED["worst"] not in self.used
        return [*self.used, *([UNROUTED] if idle else [])]

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call | None]:
        """The result, and what is remembered of such calls, if anything is."""
        self.patience.operator()
        traits = _traits(func)
        called = args
        if traits.is_sparse:
            raise UsageError(f"{func.overloadpacket.__name__} {_SPARSE}")
        if traits.is_special:
            if (answer := self._special(func, args, kwargs)) is not NotImplemented:
                return answer, None
            if func.overloadpacket in _INDEXING:
                args = (args[0], self._without_masks(args[1]), *args[2:])
        known = None
        try:
            _refuse_meta(func, args)
            result, known = self._shapes.call(func, args, kwargs)
        except _NO_DATA:
            result = _like(_on_data(func, args, kwargs)) if _is_known(args, kwargs) else self._of_full_size(func, args)
        if traits.tells_origin:
            self._note_origin(func.overloadpacket, args, result)
        _compute_data(func, called, kwargs, result)
        return result, known

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What has a result of its own here; else NotImplemented."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self._scalar(func, args[0])
        if packet is aten.nonzero:
            return self._nonzero(func, args[0])
        if packet is aten.masked_select:
            return aten.index.Tensor(args[0], self._without_masks([args[1]]))
        if packet is aten.bincount:
            return self._bincount(func, args, kwargs)
        if packet is aten._grouped_mm and isinstance(args[0], FakeTensor):
            return _grouped_mm(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        if packet is aten.histc and isinstance(args[0], FakeTensor) and not args[0].is_floating_point():
            bins = kwargs.get("bins", args[1] if len(args) > 1 else 100)
            return torch.empty(bins, dtype=args[0].dtype)  # a card counts whole numbers, a CPU does not
        if packet is aten.equal:
            return self._answer(func, args, kwargs, False, "tensors that are compared as a whole differ")
        return NotImplemented

    # ---- origins ----

    def _note_origin(self, packet: Any, args: tuple[Any, ...], result: Any) -> None:
        if packet is aten.topk:
            self._route(result[1], args[0].shape[-1])
        elif packet is aten._amp_foreach_non_finite_check_and_unscale_:
            _set_origin(args[1], _Origin(0.0))
        elif isinstance(result, (torch.Tensor, list, tuple)) and args:
            origin = self._origin_of_result(packet, args, result)
            if origin is not None:
                for tensor in (result,) if isinstance(result, torch.Tensor) else result:
                    if isinstance(tensor, torch.Tensor):
                        _set_origin(tensor, origin)

    def _origin_of_result(self, packet: Any, args: tuple[Any, ...], result: Any) -> _Origin | None:
        first = args[0]
        origin = _origin(first) if isinstance(first, torch.Tensor) else None
        router = None if origin is None else origin.router
        if packet in _SAME_ELEMENTS:
            return origin
        if packet is aten.full and result.dtype == torch.bool:
            return _Origin(float(args[1]))
        if packet in _DECIDED_BY and len(args) > 1 and isinstance(args[1], torch.Tensor):
            decisive, other = _DECIDED_BY[packet], _origin(args[1])
            means = [each.mean for each in (origin, other) if each is not None]
            return _Origin(decisive) if decisive in means else None
        if packet in (aten.scatter_, aten.scatter) and (index := _origin(args[2])) is not None and index.router:
            return _Origin(self._share(index.router), index.router)  # one-hot
        if packet in (aten.eq, aten.ne) and len(args) > 1 and args[1] is first:  # as isfinite and checks for NaN ask
            return _Origin(float(packet is aten.eq))
        if packet in _TRUTH:
            return _Origin(_TRUTH[packet], router)
        if packet is aten.mul:
            return self._both_true(args) if result.dtype == torch.bool else None
        if packet is aten.eq:
            with_zero = not isinstance(args[1], torch.Tensor) and args[1] == 0
            both_zero = with_zero and origin is not None and origin.mean == 0.0
            return _Origin(self._share(router) if router else float(both_zero), router)
        if packet in (aten.sum, aten.count_nonzero, aten.any) and isinstance(result, torch.Tensor) and result.numel():
            mean = 1.0 if origin is None or origin.mean is None else origin.mean
            total = mean * first.numel() / result.numel()
            is_count = router is not None and tuple(result.shape) == (router.num_experts,)
            return _Origin(min(total, 1.0) if packet is aten.any else total, router, is_count)
        if packet in (aten.gt, aten.ge) and origin is not None and origin.mean is not None:
            if router is not None:  # which experts are chosen at all
                num_chosen = router.top_k if self._routing == "worst" else router.num_experts
                return _Origin(num_chosen / result.numel(), router)
            return _Origin(float(origin.mean > 0), router)
        if packet is aten.logical_not or packet is aten.bitwise_not:
            return None if origin is None or origin.mean is None else _Origin(1.0 - origin.mean)
        return None

    def _both_true(self, args: tuple[Any, ...]) -> _Origin | None:
        origins = [_origin(each) for each in args[:2] if isinstance(each, torch.Tensor)]
        means = [None if origin is None or origin.router else origin.mean for origin in origins]
        return _Origin(1.0) if means == [1.0, 1.0] else None

    def _share(self, router: _Router) -> float:
        """The share of the slots (tokens x top_k) that one expert gets."""
        return 1 / router.top_k if self._routing == "worst" else 1 / router.num_experts

    def _route(self, indices: torch.Tensor, num_experts: int) -> None:
        """Indices of a topk are a router's choice; where they are real they are made to follow the policy."""
        top_k = indices.shape[-1]
        _set_origin(indices, _Origin(None, _Router(num_experts, top_k, indices.numel(), top_k)))
        if top_k < num_experts and not isinstance(indices, FakeTensor):
            flat = torch.arange(indices.numel(), dtype=indices.dtype)
            indices.copy_((flat % (top_k if self._routing == "worst" else num_experts)).view(indices.shape))

    # ---- answers ----

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, sentence: str) -> Any:
        """The true answer where there is data, else `value`."""
        if _is_known(args, kwargs):
            return _on_data(func, args, kwargs)
        try:
            _refuse_meta(func, args)
            return func(*args, **kwargs)
        except _NO_DATA:
            self.used[f"assumed: {sentence}"] = None
            return value

    def _scalar(self, func: Any, tensor: torch.Tensor) -> Any:
        origin = _origin(tensor)
        mean = None if origin is None else origin.mean
        if tensor.dtype == torch.bool:
            value: Any = bool(mean) if mean is not None else False
            router = origin and origin.router
            if value and router and self._routing == "worst":
                router.unseen, value = router.unseen - 1, router.unseen > 0
            sentence = "a branch on data: comparisons are false, any() and all() of a mask true, values finite"
        elif tensor.dtype.is_floating_point:
            value = 1.0 if mean is None else float(mean)
            sentence = "a number read from the device is 1.0"
        elif origin is not None and origin.router is not None and origin.is_count:
            value, sentence = self._next_count(origin.router), ROUTED[self._routing].removeprefix("assumed: ")
        else:
            value = 0 if mean is None else math.ceil(mean)
            sentence = "a count read from the device counts every element, an index is 0"
        return self._answer(func, (tensor,), {}, value, sentence)

    def _next_count(self, router: _Router) -> int:
        """The tokens of one expert after the other; those of all are what was chosen."""
        number = router.num_counted % router.num_experts
        router.num_counted += 1
        num_busy = router.top_k if self._routing == "worst" else router.num_experts
        return (router.num_slots + num_busy - 1 - number) // num_busy if number < num_busy else 0

    def _nonzero(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        try:
            _refuse_meta(func, (tensor,))
            found: torch.Tensor = func(tensor)
            return found
        except _NO_DATA:
            found = torch.empty((self._count(tensor), tensor.dim()), dtype=torch.int64, device=tensor.device)
            _compute_data(func, (tensor,), {}, found)
            return found

    def _count(self, mask: torch.Tensor) -> int:
        """How many elements of a mask are taken to be true."""
        if _is_known((mask,), {}):
            return len(_on_data(aten.nonzero.default, (mask,), {}))
        origin = _origin(mask)
        if origin is not None and origin.router is not None:
            self.used[ROUTED[self._routing]] = None
        else:
            self.used["assumed: a mask selects every element"] = None
        return math.ceil(mask.numel() * (1.0 if origin is None or origin.mean is None else origin.mean) - 1e-9)

    def _without_masks(self, indices: Any) -> list[Any]:
        """Index lists with masks replaced by the positions that they select."""
        out: list[Any] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and _has_no_data(index) and index.dtype in (torch.bool, torch.uint8):
                out.extend(self._nonzero(aten.nonzero.default, index).unbind(1))
            else:
                out.append(index)
        return out

    def _bincount(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        try:
            _refuse_meta(func, args)
            counts: torch.Tensor = func(*args, **kwargs)
        except _NO_DATA:
            origin = _origin(args[0])
            bins = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            bins = max(bins, origin.router.num_experts if origin and origin.router else 1)
            counts = torch.empty((bins,), dtype=torch.int64, device=args[0].device)
            _set_origin(counts, _Origin(args[0].numel() / bins))
        return counts

    def _of_full_size(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Outputs as large as the input, for the operators whose size depends on data (unique and its like)."""
        self.used[f"assumed: {func.overloadpacket.__name__} keeps every element"] = None
        source = args[0]
        size = (source.numel(),)
        outputs = [
            torch.empty(size, dtype=source.dtype if position == 0 else torch.int64, device=source.device)
            for position in range(len(func._schema.returns))
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """GroupedMMUtils.h: rows of the output are padded to 16 bytes. PyTorch's own shapes refuse all but bfloat16, which
    its kernels have not since 2.10."""
    if a.dim() == 2 and b.dim() == 2:
        assert offsets is not None
        shape = (offsets.shape[0], a.shape[0], b.shape[1])
    else:
        shape = (*((a.shape[0],) if a.dim() == b.dim() == 3 else ()), a.shape[-2], b.shape[-1])
    step = 16 // a.element_size()
    padded = -(-shape[-1] // step) * step
    strides = (shape[-2] * padded, padded, 1)[-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=a.dtype, device=a.device)


def _like(data: Any) -> Any:
    """Fake tensors of such shapes."""
    return tree_map_only(torch.Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype), data)


_OVERWRITTEN = "_fitune_overwritten"
"""An attribute of the storage of data into which something was written that is not known."""


def _has_no_data(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _refuse_meta(func: Any, args: tuple[Any, ...]) -> None:
    """As FakeTensorMode refuses what needs data; the meta device has an error of its own for each."""
    if _traits(func).needs_data and any(isinstance(each, torch.Tensor) and each.is_meta for each in args):
        raise DynamicOutputShapeException(func)


def _data(tensor: torch.Tensor) -> torch.Tensor | None:
    if _has_no_data(tensor):
        data: torch.Tensor | None = getattr(tensor, "_fitune_data", None)
        return None if data is None or hasattr(data.untyped_storage(), _OVERWRITTEN) else data
    return tensor if tensor.device.type == "cpu" else None


def _compute_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """The results' data, where that of all tensors they are computed from is known. What an operator writes into is
    written for real too, or not known any longer."""
    is_mutable = _traits(func).is_mutable
    known = bool(args) and _is_known(args, kwargs)
    if not known and not is_mutable:
        return
    results = _tensors(result)
    written = _written(func, args) if is_mutable else []
    if not (results or written) or not all(map(_has_no_data, results)):
        return
    for each in written:
        if each.dtype == torch.bool and (origin := _origin(each)) is not None and origin.router is None:
            del each._fitune_origin  # type: ignore[attr-defined]
    if not known or sum(each.numel() for each in results) > MOST_KNOWN_ELEMENTS:
        for each in written:
            its = each.__dict__.pop("_fitune_data", None)
            if its is not None:  # a view may have been written into: what it is a view of is not known either
                setattr(its.untyped_storage(), _OVERWRITTEN, True)
        return
    data = _tensors(_on_data(func, args, kwargs))
    for each, its in zip(results, data, strict=True) if not written else ():
        _tell(each, its)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _written(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    pairs = zip(func._schema.arguments, args, strict=False)
    return [
        each
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write
        for each in tree_leaves(value)
        if isinstance(each, torch.Tensor) and _has_no_data(each)
    ]


def _is_known(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there are tensors, and the data of all of them is known. The first is looked at first: nearly all are
    unknown."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if not isinstance(first, torch.Tensor) or _data(first) is None:
        return False
    return not tree_any(lambda value: isinstance(value, torch.Tensor) and _data(value) is None, (args, kwargs))


def _on_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _disable_current_modes():
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*tree_map_only(torch.Tensor, _data, args), **tree_map_only(torch.Tensor, _data, kwargs))
        if "empty" in func.__name__:
            result.zero_()  # what lies there by chance would be another prediction each time
    return result


def known_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As `tensor.numpy()`; zeros where the data is not known."""
    data = _data(tensor)
    with _disable_current_modes():
        return (torch.zeros(tensor.shape, dtype=tensor.dtype) if data is None else data.detach()).numpy()


def _origin(tensor: torch.Tensor) -> _Origin | None:
    return getattr(tensor, "_fitune_origin", None)


def _set_origin(tensor: torch.Tensor, origin: _Origin) -> None:
    tensor._fitune_origin = origin  # type: ignore[attr-defined]
