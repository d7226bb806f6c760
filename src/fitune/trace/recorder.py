"""A dispatch mode that writes down the birth and death of every storage while any training loop runs.

What an operator returns is looked at after it ran: a storage not seen before is born there, and dies when its last
tensor, saved copy or view is gone. What an operator allocates inside and frees again is invisible here; for CUDA those
temporaries are added by rule (`cuda_behaviour`).

Phases and modules are found without the loop's help: forward from global module hooks, backward from autograd's graph
task, the optimizer from its global step hooks. In the backward the module is that of the forward operator whose
gradient is computed, found by autograd's sequence number.
"""

import copy
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.trace.allocation import Allocation, Free, Output
from fitune.trace.autograd_in_place import IN_PLACE, as_autograd_does, count_alone
from fitune.trace.events import ON_HOST, TRANSFER, Category, Phase
from fitune.trace.operator_cost import bytes_of, count_flops, moved_bytes
from fitune.trace.operators import by_operator
from fitune.trace.recording import NEVER, Birth, Recording, Rule, TraceWork, Where, make_recording, split_turn
from fitune.trace.shape_cache import Call

Operator = torch._ops.OpOverload
_DEVICE_OF = torch.ops.prim.device.default
_LIFT_FRESH = torch.ops.aten.lift_fresh.default
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""A view that its schema does not call one, because autograd need not know: nothing is moved."""
_ZEROS = ("aten.new_zeros.default", "aten.zeros.default", "aten.zeros_like.default")
_COPIES = ("aten.copy_", "aten.clone", "aten._to_copy")
Place = Literal["host", "card"]
_WorkPlace = tuple[Phase, int, int, str, int, str, str]


class Kernels(Protocol):
    """How an operator is carried out, and what the target's kernel allocates besides its outputs.

    of_card: whether they run on a card, beside which the host has memory of its own.
    """

    of_card: bool

    def call(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call | None]:
        """The result, and what is remembered of such calls, if anything is."""

    def workspaces(self, func: Operator, phase: Phase) -> Sequence[int]:
        """Bytes of what the operator allocates behind its outputs and keeps until `forget_workspaces`."""

    def forget_workspaces(self) -> None:
        """The next operators allocate them again."""

    def allocations(
        self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Sequence[Allocation]] | None:
        """Returns all arguments of the operator, and what its kernel allocates and frees, in order; None for an
        operator without a rule."""


@dataclass(slots=True, eq=False)
class _Storage:
    """dies_after: the place in the order of births of the one after which it dies."""

    num_bytes: int
    category: Category | None
    where: Where
    op: str
    reference: weakref.ref[torch.UntypedStorage] | None = None
    dies_after: int = NEVER
    death: Where | None = None
    rule: Rule | None = None


@dataclass(frozen=True)
class Savepoint:
    """A moment of a recording outside of its steps: what was written down until then. alive: with its category.
    workspaces: those that live. kernels: as they were."""

    num_births: int
    num_silent: int
    work: dict[_WorkPlace, tuple[int, ...]]
    alive: dict[int, tuple[_Storage, Category | None]]
    host: frozenset[int]
    workspaces: list[_Storage]
    kernels: Kernels


class Recorder(TorchDispatchMode):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels, self._alone = kernels, count_alone()
        self._births: list[_Storage] = []
        self._silent: list[tuple[int, Rule]] = []
        self._work: dict[_WorkPlace, list[int]] = {}
        self._alive: dict[int, _Storage] = {}
        self._host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._in_optimizer = self._makes_state = False
        self._begin("load", 0)
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._sequence: tuple[list[int], list[str]] = ([], [])
        self._saved_candidates: list[_Storage] = []
        self._hooked: set[int] = set()
        self._placing: Place | None = None
        self._turns: dict[str, tuple[int, str]] = {}

    # ---- what the driver tells ----

    def load(self, model: torch.nn.Module) -> None:
        """The model's parameters and buffers, in its order; again after the loop's set-up, which may move them."""
        self._names |= {id(module): name for name, module in model.named_modules()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            storage = self._see(tensor, "load", name.rpartition(".")[0])
            if storage is not None:
                storage.category = "parameter"
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._gradient_arrived)

    def begin_step(self, step: int) -> None:
        self._begin("forward", step)
        for items in self._sequence:
            items.clear()

    def mark(self) -> Savepoint:
        alive = {key: (storage, storage.category) for key, storage in self._alive.items()}
        work = {place: tuple(sums) for place, sums in self._work.items()}
        kernels = copy.copy(self._kernels)
        host, workspaces = frozenset(self._host), self._workspaces()
        return Savepoint(len(self._births), len(self._silent), work, alive, host, workspaces, kernels)

    def back_to(self, mark: Savepoint) -> bool:
        """Forget what came after the mark. False where what lived then lives no longer, or something else does too."""
        if self._host.keys() != mark.host or self._alive.keys() != mark.alive.keys():
            return False
        if any(self._alive[key] is not storage for key, (storage, _) in mark.alive.items()):
            return False
        for storage, category in mark.alive.values():
            storage.category = category
        for storage in mark.workspaces:
            storage.dies_after, storage.death = NEVER, None
        del self._births[mark.num_births :], self._silent[mark.num_silent :]
        self._work = {place: list(sums) for place, sums in mark.work.items()}
        self._kernels = copy.copy(mark.kernels)
        self._begin("load", 0)
        return True

    @contextmanager
    def making_state(self) -> Iterator[None]:
        """What happens inside is the optimizer's, between its updates too."""
        self._makes_state = True
        try:
            yield
        finally:
            self._makes_state = False

    def begin_micro_batch(self) -> None:
        """Known before its input arrives only to who makes it; else it is seen by what comes."""
        if self._phase in ("backward", "optimizer"):
            self._next_micro_batch()

    def end_step(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._gradient_arrived(parameter)
        self._saved_candidates.clear()

    def allocate(self, num_bytes: int, category: Category | None, op: str, *, module: str | None = None) -> _Storage:
        """A storage that no tensor here stands for. module: None for the one that runs."""
        storage = _Storage(num_bytes, category, self._where(module), op)
        self._births.append(storage)
        return storage

    def free(self, storage: _Storage) -> None:
        storage.dies_after, storage.death = len(self._births) - 1, self._where()

    def empty_cache(self) -> None:
        """As `release_workspaces` does: cuBLAS' workspaces are given back too, and are asked for again."""
        for storage in self._workspaces():
            self.free(storage)
        self._kernels.forget_workspaces()
        self.allocate(0, "workspace", "empty_cache")

    def _workspaces(self) -> list[_Storage]:
        """Those that live."""
        return [each for each in self._births if each.category == "workspace" and each.num_bytes and not each.death]

    def input_arrived(self, tensor: torch.Tensor) -> None:
        """`tensor` is a copy from the host: in the backward of what was kept there."""
        storage = self._see(tensor, "copy")
        if storage is not None and storage.category is None:
            storage.category = "activation" if self._phase == "backward" else "input"

    @contextmanager
    def placing(self, place: Place) -> Iterator[None]:
        """New storages are on the host, where they are not counted, or on the card; else they follow the inputs."""
        before, self._placing = self._placing, place
        try:
            yield
        finally:
            self._placing = before

    @contextmanager
    def running(self, module: str) -> Iterator[None]:
        """What happens inside belongs to `module`, which need be none of the model."""
        self._stack.append(module)
        self._mark_sequence()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark_sequence()

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def recording(self, source: Sequence[str]) -> Recording:
        return make_recording(
            (
                Birth(
                    each.num_bytes,
                    each.category or "temporary",
                    each.where,
                    each.op,
                    each.dies_after,
                    each.death,
                    each.rule,
                )
                for each in self._births
            ),
            (TraceWork(*key, *sums) for key, sums in self._work.items()),
            silent=self._silent,
            source=source,
        )

    # ---- operators ----

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch would wrap every call to say so

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls, and slow through FakeTensorMode
        kwargs = kwargs or {}
        traits = _traits(func)
        if traits.may_be_in_place:
            func = as_autograd_does(func, args, kwargs, alone=self._alone, is_new_zeros=self._is_new_zeros)
            traits = _traits(func)
        self._follow_phase(func, args)  # by a profiler's mark too: that of zero_grad() begins what comes next
        if traits.is_silent:
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        result, known = self._kernels.call(func, args, kwargs)
        outputs = (result,) if type(result) is FakeTensor else tuple(_tensors(result))
        if not outputs:
            written = tuple(_tensors(args[0])) if args and isinstance(args[0], (list, tuple)) else ()
            if written:  # in place, as an optimizer's update of all its parameters
                on_host = self._only_host(args, kwargs)
                self._count(func, args, kwargs, written, module=self._module(), known=known, on_host=on_host)
            return result
        is_of_host = traits.is_of_host and self._kernels.of_card
        if self._placing == "host" or (self._placing is None and (is_of_host or self._only_host(args, kwargs))):
            for tensor in outputs:
                self._put_on_host(tensor.untyped_storage())
            if traits.does_work:
                self._count(func, args, kwargs, outputs, module=self._module(), known=known, on_host=True)
            return result
        module = self._module()
        self._allocate(func, args, kwargs, outputs, module)
        if traits.does_work:
            self._count(func, args, kwargs, outputs, module=module, known=known)
        return result

    def _allocate(
        self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[torch.Tensor, ...],
        module: str,
    ) -> None:  # fmt: skip
        """Writes down the operator's outputs and what its kernel allocates beside them, in the kernel's order."""
        name = _traits(func).name
        modules = [module if source is None else source for source in self._sources(args, len(outputs))]
        arguments, steps = self._kernels.allocations(func, args, kwargs) or (None, ())
        named = {step.number for step in steps if isinstance(step, Output)}
        for number, tensor in enumerate(outputs):
            if number not in named:
                self._see(tensor, name, modules[number])
        for num_bytes in self._kernels.workspaces(func, self._phase):  # the output of a product is there before
            self.allocate(num_bytes, "workspace", name)
        if arguments is None:
            return
        sizes = [step for step in steps if isinstance(step, int)]
        rule = _rule(func, arguments, total=len(sizes))
        if rule is not None and not sizes:
            self._silent.append((self._step, rule))
        temporaries: list[_Storage] = []
        for step in (*steps, *(Free(number) for number in range(len(sizes)) if Free(number) not in steps)):
            if isinstance(step, Output) and step.on_host:
                self._put_on_host(outputs[step.number].untyped_storage())
            elif isinstance(step, Output):
                self._see(outputs[step.number], name, modules[step.number])
            elif isinstance(step, Free):
                self.free(temporaries[step.number])
            else:
                storage = self.allocate(step, "temporary", name)
                storage.rule = None if rule is None else rule._replace(position=len(temporaries))
                temporaries.append(storage)

    def _count(
        self, func: Operator, args: Any, kwargs: Any, outputs: tuple[torch.Tensor, ...], *,
        module: str, known: Call | None, on_host: bool = False,
    ) -> None:  # fmt: skip
        """on_host: whether the outputs are there."""
        work = None if known is None else known.work
        if work is None:
            work = moved_bytes(func, args, outputs), count_flops(func, args, kwargs, outputs)
            if known is not None:
                known.work = work
        name, dtype = _traits(func).packet_name, _dtype_name(outputs[0].dtype)
        if self._host and name in _COPIES and any(self.is_on_host(tensor) != on_host for tensor in _tensors(args)):
            name, work = TRANSFER, (bytes_of(outputs), 0)
        elif on_host:
            if not self._in_optimizer:
                return  # what a loop prepares while the card works
            name = f"{ON_HOST}{name}"
        turn, loop = self._turn(module)
        sums = self._work.setdefault((self._phase, self._step, self._micro_batch, loop, turn, name, dtype), [0, 0, 0])
        for i, number in enumerate((1, *work)):
            sums[i] += number

    def _sources(self, args: tuple[Any, ...], num_outputs: int) -> Sequence[str | None]:
        """The modules that the outputs belong to, where none runs: in the optimizer, and for operators on whole lists,
        those of what they are computed from."""
        by_tensor = bool(args) and (self._phase == "optimizer" or isinstance(args[0], (list, tuple)))
        if self._stack or not by_tensor:
            return (None,) * num_outputs
        inputs = tuple(_tensors(args[0]))
        if len(inputs) != num_outputs:
            return (None,) * num_outputs
        found = (self._find(tensor) for tensor in inputs)
        return [None if storage is None else storage.where.module for storage in found]

    def _only_host(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        is_host = None
        for tensor in _tensors((args, tuple(kwargs.values()))) if self._host else ():
            if not (is_host := self.is_on_host(tensor)):
                break
        return bool(is_host)

    def _put_on_host(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._host:
            self._host[key] = weakref.ref(storage, lambda _: self._host.pop(key, None))

    def _see(self, tensor: torch.Tensor, op: str, module: str | None = None) -> _Storage | None:
        """The record of the tensor's storage; a new one where it is born here; None for empty ones and the host's."""
        untyped = tensor.untyped_storage()
        key, num_bytes = untyped._cdata, untyped.nbytes()
        known = self._alive.get(key)
        if known is not None:
            if known.num_bytes == num_bytes:
                return known
            self._die(key)  # resized in place
        elif key in self._host:
            return None
        if not num_bytes:
            return None
        storage = self.allocate(num_bytes, None, op, module=module)
        if known is not None:
            storage.category = known.category
        storage.reference = weakref.ref(untyped, lambda _: self._die(key))
        self._alive[key] = storage
        self._guess_category(storage)
        return storage

    def _guess_category(self, storage: _Storage) -> None:
        """What is known at birth; gradients, optimizer state and what the backward needs are known later."""
        if self._phase == "load":
            storage.category = storage.category or "input"
        elif self._phase == "forward" and not self._forward_began and not self._stack:
            storage.category = "input"
        elif self._phase == "forward" or (self._phase == "backward" and torch.is_grad_enabled()):
            self._saved_candidates.append(storage)

    def _die(self, key: int) -> None:
        storage = self._alive.pop(key, None)
        if storage is not None:
            self.free(storage)

    # ---- phases ----

    def _begin(self, phase: Phase, step: int) -> None:
        self._step, self._micro_batch, self._phase, self._forward_began = step, 0, phase, False

    def _follow_phase(self, func: Operator, args: tuple[Any, ...]) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._phase = "backward"
            if self._saved_candidates and not torch.is_grad_enabled():
                for storage in self._saved_candidates:
                    if storage.category is None and storage.reference is not None and storage.reference() is not None:
                        storage.category = "activation"
                self._saved_candidates.clear()
        elif self._in_optimizer or self._makes_state or self._phase == "backward":
            self._phase = "optimizer"
        elif self._phase == "optimizer" and not any(True for _ in _tensors(args)):
            self._next_micro_batch()  # a factory function: the next micro-batch's input

    def _next_micro_batch(self) -> None:
        self._phase, self._forward_began = "forward", False
        self._micro_batch += 1

    def _enter_module(self, module: torch.nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            if self._phase in ("backward", "optimizer") and not self._stack:
                self._next_micro_batch()
            self._forward_began = self._phase == "forward"
        self._stack.append(self._names.get(id(module), type(module).__name__))
        self._mark_sequence()

    def _leave_module(self, module: torch.nn.Module, *_: Any) -> None:
        if self._stack:
            self._stack.pop()
            self._mark_sequence()

    def _mark_sequence(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            numbers, names = self._sequence
            numbers.append(torch._C._autograd._get_sequence_nr())
            names.append(self._stack[-1] if self._stack else "")

    def _turn(self, module: str) -> tuple[int, str]:
        if module not in self._turns:
            self._turns[module] = split_turn(module)[1:]
        return self._turns[module]

    def _module(self) -> str:
        if self._stack:
            return self._stack[-1]
        if self._phase == "backward" and (node := torch._C._current_autograd_node()) is not None:
            numbers, names = self._sequence
            position = bisect_right(numbers, node._sequence_nr()) - 1
            return names[position] if position >= 0 else ""
        return ""

    def _where(self, module: str | None = None) -> Where:
        """module: None for the one that runs."""
        return Where(self._phase, self._step, self._micro_batch, self._module() if module is None else module)

    def _gradient_arrived(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and (storage := self._find(parameter.grad)) is not None:
            storage.category = "gradient"

    def _begin_optimizer(self, *_: Any) -> None:
        self._in_optimizer, self._phase = True, "optimizer"

    def _end_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_optimizer = False
        state = list(optimizer.state.values())
        if self._makes_state:  # parameter by parameter
            state = [optimizer.state.get(each, {}) for group in optimizer.param_groups for each in group["params"]]
        for tensor in _tensors(state):
            if (storage := self._find(tensor)) is not None and storage.category in (None, "input"):
                storage.category = "optimizer_state"

    def _is_new_zeros(self, tensor: torch.Tensor) -> bool:
        storage = self._find(tensor)
        return storage is not None and storage.op in _ZEROS

    def _find(self, tensor: torch.Tensor) -> _Storage | None:
        return self._alive.get(tensor.untyped_storage()._cdata)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
                register_optimizer_step_pre_hook(self._begin_optimizer),
                register_optimizer_step_post_hook(self._end_optimizer),
            ):
                stack.callback(handle.remove)
            yield


class _Traits(NamedTuple):
    """Of an operator. is_silent: whether it only tells a profiler something. does_work: whether it is no view.
    may_be_in_place: whether autograd may have called its twin in place. is_of_host: whether it makes a tensor of a
    number of Python, as when one is written into a slice."""

    name: str
    packet_name: str
    is_silent: bool
    does_work: bool
    may_be_in_place: bool
    is_of_host: bool


@by_operator
def _traits(func: Any) -> _Traits:
    does_work = not func.is_view and func is not _UNSAFE_VIEW
    return _Traits(
        str(func),
        str(func.overloadpacket),
        func.namespace == "profiler",
        does_work,
        func in IN_PLACE,
        func is _LIFT_FRESH,
    )


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


_MOST_IN_A_LIST = 4


def _rule(func: Operator, args: tuple[Any, ...], *, total: int) -> Rule | None:
    """None where many tensors come in a list, as those of an optimizer."""
    if any(isinstance(value, (list, tuple)) and len(value) > _MOST_IN_A_LIST for value in args):
        return None
    return Rule(func.name(), tuple(_shape(value) for value in args), 0, total)


def _shape(value: Any) -> object:
    """Tensors as `temporaries_by_shape` reads them."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape), value.dtype
        offset = value.storage_offset()
        return shape if not offset and value.is_contiguous() else (*shape, value.stride(), offset)
    return tuple(_shape(each) for each in value) if isinstance(value, (list, tuple)) else value
