"""Answer for data that fake tensors do not have, so that data-dependent loops can be recorded.

A branch, a count or a shape may depend on data. The answer comes from what is known about the
tensor's origin: a sum of ones is a count, the indices that topk returns are a router's choice,
`isfinite` is true. Each kind of answer that was used is listed once in `MemoryTrace.source`. Where
the data itself is known (see `known_data`), it is used instead and nothing is assumed.
"""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from fitune.errors import UsageError
from fitune.recorder.data_traits import (
    DECIDED_BY,
    GROUPED_MM,
    INDEXING,
    SAME_ELEMENTS,
    TRUTH,
    traits_of,
)
from fitune.recorder.events import ROUTED, UNROUTED
from fitune.recorder.known_data import (
    Origin,
    Router,
    compute_data,
    has_no_data,
    is_known,
    origin_of,
    run_on_data,
    set_data,
    set_origin,
)
from fitune.recorder.patience import Patience
from fitune.recorder.routing import Routing
from fitune.recorder.shape_cache import Call, ShapeMemory

aten = torch.ops.aten


_SPARSE = (
    "makes a sparse tensor, whose memory is not predicted (nn.Embedding with sparse=True makes "
    "them): predict the loop with dense tensors in their place, which need more"
)
_NO_DATA = (DataDependentOutputException, DynamicOutputShapeException)


def provide_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Set the values that a fake tensor of a batch stands for.

    Examples are a mask without padding and the position ids of packed samples.
    """
    with _disable_current_modes():
        set_data(tensor, data.clone())


class Assumptions:
    """Runs operators on real or fake tensors, and answers for the data where there is none."""

    def __init__(
        self, routing: Routing, shapes: ShapeMemory, patience: Patience | None = None
    ) -> None:
        self._routing = routing
        self._shapes = shapes
        self.used: dict[str, None] = {}
        self.patience = patience or Patience()

    def lines(self) -> list[str]:
        """Return what was assumed.

        If the worst routing was wanted and nothing was routed, the list says that too.
        """
        idle = self._routing == "worst" and ROUTED["worst"] not in self.used
        return [*self.used, *([UNROUTED] if idle else [])]

    def call(
        self, func: Any, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[object, Call | None]:
        """Return the operator's result, and what is remembered of similar calls, if anything is."""
        self.patience.operator()
        traits = traits_of(func)
        called = args
        if traits.is_sparse:
            raise UsageError(f"{func.overloadpacket.__name__} {_SPARSE}")
        if traits.is_special:
            if (answer := self._special(func, args, kwargs)) is not NotImplemented:
                return answer, None
            if func.overloadpacket in INDEXING:
                args = (args[0], self._without_masks(args[1]), *args[2:])
        known = None
        try:
            _refuse_meta(func, args)
            result, known = self._shapes.call(func, args, kwargs)
        except _NO_DATA:
            result = (
                _like(run_on_data(func, args, kwargs))
                if is_known(args, kwargs)
                else self._of_full_size(func, args)
            )
        if traits.gives_origin:
            self._note_origin(func.overloadpacket, args, result)
        compute_data(func, called, kwargs, result)
        return result, known

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Return the result of an operator that is handled here, or NotImplemented."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self._scalar(func, args[0])
        if packet is aten.nonzero:
            return self._nonzero(func, args[0])
        if packet is aten.masked_select:
            return aten.index.Tensor(args[0], self._without_masks([args[1]]))
        if packet is aten.bincount:
            return self._bincount(func, args, kwargs)
        if packet is GROUPED_MM and isinstance(args[0], FakeTensor):
            return _grouped_mm(
                args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None)
            )
        if (
            packet is aten.histc
            and isinstance(args[0], FakeTensor)
            and not args[0].is_floating_point()
        ):
            bins = kwargs.get("bins", args[1] if len(args) > 1 else 100)
            # CUDA's histc accepts integers, the CPU's does not.
            return torch.empty(bins, dtype=args[0].dtype)
        if packet is aten.equal:
            return self._answer(
                func, args, kwargs, False, "tensors that are compared as a whole differ"
            )
        return NotImplemented

    # ---- origins ----

    def _note_origin(self, packet: object, args: tuple[Any, ...], result: Any) -> None:
        """Attach to the operator's results what is known about their elements."""
        if packet is aten.topk:
            self._route(result[1], args[0].shape[-1])
        elif packet is aten._amp_foreach_non_finite_check_and_unscale_:
            set_origin(args[1], Origin(0.0))
        elif isinstance(result, (torch.Tensor, list, tuple)) and args:
            origin = self._origin_of_result(packet, args, result)
            if origin is not None:
                for tensor in (result,) if isinstance(result, torch.Tensor) else result:
                    if isinstance(tensor, torch.Tensor):
                        set_origin(tensor, origin)

    def _origin_of_result(
        self, packet: object, args: tuple[Any, ...], result: Any
    ) -> Origin | None:
        """Return what is known about the elements of the result, or None."""
        first = args[0]
        origin = origin_of(first) if isinstance(first, torch.Tensor) else None
        router = None if origin is None else origin.router
        if packet in SAME_ELEMENTS:
            return origin
        if packet is aten.full and result.dtype == torch.bool:
            return Origin(float(args[1]))
        if packet in DECIDED_BY and len(args) > 1 and isinstance(args[1], torch.Tensor):
            decisive, other = DECIDED_BY[packet], origin_of(args[1])
            means = [each.mean for each in (origin, other) if each is not None]
            return Origin(decisive) if decisive in means else None
        if (
            packet in (aten.scatter_, aten.scatter)
            and (index := origin_of(args[2])) is not None
            and index.router
        ):
            # A scatter of a router's choices makes a one-hot mask of its experts.
            return Origin(self._share(index.router), index.router)
        # isfinite and checks for NaN compare a tensor with itself; values are assumed finite.
        if packet in (aten.eq, aten.ne) and len(args) > 1 and args[1] is first:
            return Origin(float(packet is aten.eq))
        if packet in TRUTH:
            return Origin(TRUTH[packet], router)
        if packet is aten.mul:
            return self._both_true(args) if result.dtype == torch.bool else None
        if packet is aten.eq:
            with_zero = not isinstance(args[1], torch.Tensor) and args[1] == 0
            both_zero = with_zero and origin is not None and origin.mean == 0.0
            return Origin(self._share(router) if router else float(both_zero), router)
        if (
            packet in (aten.sum, aten.count_nonzero, aten.any)
            and isinstance(result, torch.Tensor)
            and result.numel()
        ):
            mean = 1.0 if origin is None or origin.mean is None else origin.mean
            total = mean * first.numel() / result.numel()
            is_count = router is not None and tuple(result.shape) == (router.num_experts,)
            return Origin(min(total, 1.0) if packet is aten.any else total, router, is_count)
        if packet in (aten.gt, aten.ge) and origin is not None and origin.mean is not None:
            if router is not None:  # the mask of the experts that are chosen at all
                num_chosen = router.top_k if self._routing == "worst" else router.num_experts
                return Origin(num_chosen / result.numel(), router)
            return Origin(float(origin.mean > 0), router)
        if packet is aten.logical_not or packet is aten.bitwise_not:
            return None if origin is None or origin.mean is None else Origin(1.0 - origin.mean)
        return None

    def _both_true(self, args: tuple[object, ...]) -> Origin | None:
        """Return the origin of a product of masks, if both masks are true everywhere."""
        origins = [origin_of(each) for each in args[:2] if isinstance(each, torch.Tensor)]
        means = [None if origin is None or origin.router else origin.mean for origin in origins]
        return Origin(1.0) if means == [1.0, 1.0] else None

    def _share(self, router: Router) -> float:
        """Return the share of the slots (tokens x top_k) that one expert gets."""
        return 1 / router.top_k if self._routing == "worst" else 1 / router.num_experts

    def _route(self, indices: torch.Tensor, num_experts: int) -> None:
        """Note that the indices of a topk are a router's choice.

        Indices that are real are overwritten so that they follow the assumed routing.
        """
        top_k = indices.shape[-1]
        set_origin(indices, Origin(None, Router(num_experts, top_k, indices.numel(), top_k)))
        if top_k < num_experts and not isinstance(indices, FakeTensor):
            flat = torch.arange(indices.numel(), dtype=indices.dtype)
            indices.copy_(
                (flat % (top_k if self._routing == "worst" else num_experts)).view(indices.shape)
            )

    # ---- answers ----

    def _answer(
        self,
        func: Any,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        value: object,
        text: str,
    ) -> object:
        """Return the true answer if the data is known, else `value`, and note the assumption."""
        if is_known(args, kwargs):
            return run_on_data(func, args, kwargs)
        try:
            _refuse_meta(func, args)
            return func(*args, **kwargs)
        except _NO_DATA:
            self.used[f"assumed: {text}"] = None
            return value

    def _scalar(self, func: object, tensor: torch.Tensor) -> object:
        """Return the value of a one-element tensor that the loop reads, as `.item()` does."""
        origin = origin_of(tensor)
        mean = None if origin is None else origin.mean
        if tensor.dtype == torch.bool:
            value: object = bool(mean) if mean is not None else False
            router = origin and origin.router
            if value and router and self._routing == "worst":
                router.unseen, value = router.unseen - 1, router.unseen > 0
            text = "a branch on data: comparisons are false, any() and all() of a mask true, values finite"
        elif tensor.dtype.is_floating_point:
            value = 1.0 if mean is None else float(mean)
            text = "a number read from the device is 1.0"
        elif origin is not None and origin.router is not None and origin.is_count:
            value, text = (
                self._next_count(origin.router),
                ROUTED[self._routing].removeprefix("assumed: "),
            )
        else:
            value = 0 if mean is None else math.ceil(mean)
            text = "a count read from the device counts every element, an index is 0"
        return self._answer(func, (tensor,), {}, value, text)

    def _next_count(self, router: Router) -> int:
        """Return the number of tokens of the next expert.

        The numbers of all experts add up to the number of slots.
        """
        number = router.num_counted % router.num_experts
        router.num_counted += 1
        num_busy = router.top_k if self._routing == "worst" else router.num_experts
        return (router.num_slots + num_busy - 1 - number) // num_busy if number < num_busy else 0

    def _nonzero(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Return the indices of the mask's true elements.

        Without data, they are a tensor of the assumed number of indices.
        """
        try:
            _refuse_meta(func, (tensor,))
            found: torch.Tensor = func(tensor)
            return found
        except _NO_DATA:
            found = torch.empty(
                (self._count(tensor), tensor.dim()), dtype=torch.int64, device=tensor.device
            )
            compute_data(func, (tensor,), {}, found)
            return found

    def _count(self, mask: torch.Tensor) -> int:
        """Return how many elements of the mask are assumed to be true."""
        if is_known((mask,), {}):
            return len(run_on_data(aten.nonzero.default, (mask,), {}))
        origin = origin_of(mask)
        if origin is not None and origin.router is not None:
            self.used[ROUTED[self._routing]] = None
        else:
            self.used["assumed: a mask selects every element"] = None
        return math.ceil(
            mask.numel() * (1.0 if origin is None or origin.mean is None else origin.mean) - 1e-9
        )

    def _without_masks(self, indices: Any) -> list[object]:
        """Return the index list with each mask replaced by the indices that it selects."""
        out: list[object] = []
        for index in indices:
            if (
                isinstance(index, torch.Tensor)
                and has_no_data(index)
                and index.dtype in (torch.bool, torch.uint8)
            ):
                out.extend(self._nonzero(aten.nonzero.default, index).unbind(1))
            else:
                out.append(index)
        return out

    def _bincount(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the counts. Without data, they are a tensor of the assumed number of bins."""
        try:
            _refuse_meta(func, args)
            counts: torch.Tensor = func(*args, **kwargs)
        except _NO_DATA:
            origin = origin_of(args[0])
            bins = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            bins = max(bins, origin.router.num_experts if origin and origin.router else 1)
            counts = torch.empty((bins,), dtype=torch.int64, device=args[0].device)
            set_origin(counts, Origin(args[0].numel() / bins))
        return counts

    def _of_full_size(self, func: Any, args: tuple[Any, ...]) -> object:
        """Return outputs as large as the input.

        This is for operators such as unique, whose output size depends on data.
        """
        self.used[f"assumed: {func.overloadpacket.__name__} keeps every element"] = None
        source = args[0]
        size = (source.numel(),)
        outputs = [
            torch.empty(
                size, dtype=source.dtype if position == 0 else torch.int64, device=source.device
            )
            for position in range(len(func._schema.returns))
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Return the output of a grouped matrix product, padded to rows of 16 bytes (GroupedMMUtils.h).

    PyTorch's own shape function refuses all dtypes but bfloat16; its kernels accept others since
    2.10.
    """
    if a.dim() == 2 and b.dim() == 2:
        assert offsets is not None
        shape = (offsets.shape[0], a.shape[0], b.shape[1])
    else:
        shape = (*((a.shape[0],) if a.dim() == b.dim() == 3 else ()), a.shape[-2], b.shape[-1])
    step = 16 // a.element_size()
    padded = -(-shape[-1] // step) * step
    strides = (shape[-2] * padded, padded, 1)[-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=a.dtype, device=a.device)


def _like(data: object) -> object:
    """Return fake tensors of the same shapes."""
    return tree_map_only(torch.Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype), data)


def _refuse_meta(func: Any, args: tuple[object, ...]) -> None:
    """Raise DynamicOutputShapeException for a meta tensor whose data the operator needs.

    FakeTensorMode raises it for fake tensors; on the meta device each operator raises a different
    error.
    """
    if traits_of(func).needs_data and any(
        isinstance(each, torch.Tensor) and each.is_meta for each in args
    ):
        raise DynamicOutputShapeException(func)
