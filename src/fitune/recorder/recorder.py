"""Records when every storage is allocated and freed while a training loop runs.

The recorder is a dispatch mode: it looks at what an operator returns. A storage that it has not
seen before was allocated by that operator, and it is freed when its last tensor, saved copy or view
is gone. What a kernel allocates and frees within an operator cannot be seen here; for CUDA, rules
add these temporaries (`cuda_behaviour`).
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.recorder.allocation import Free, Output
from fitune.recorder.autograd_in_place import as_autograd_does, count_alone
from fitune.recorder.events import ON_HOST, TRANSFER, Category
from fitune.recorder.kernels import Kernels
from fitune.recorder.operator_cost import Operator, bytes_of, count_flops, moved_bytes, tensors_in
from fitune.recorder.operator_traits import Traits, dtype_name, rule_of, traits_of
from fitune.recorder.phase_tracker import PhaseTracker, is_in_backward
from fitune.recorder.recorded_storage import RecordedStorage, Savepoint, WorkPlace
from fitune.recorder.recording import (
    NEVER,
    RecordedAllocation,
    Recording,
    Rule,
    TraceWork,
    make_recording,
)
from fitune.recorder.shape_cache import Call

_DEVICE_OF = torch.ops.prim.device.default
#: Operators whose result is new and filled with zeros.
_ZEROS = ("aten.new_zeros.default", "aten.zeros.default", "aten.zeros_like.default")
#: Operators that are transfers where they read from one device and write to the other.
_COPIES = ("aten.copy_", "aten.clone", "aten._to_copy")
Place = Literal["host", "card"]


class Recorder(TorchDispatchMode):
    """Records the allocations, the frees and the operators' work of the code that runs inside."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels, self._alone = kernels, count_alone()
        #: All storages in the order of allocation; one of 0 bytes stands for an emptied cache.
        self._allocations: list[RecordedStorage] = []
        #: (step, rule) of every operator call whose rule gave no temporaries.
        self._empty_rules: list[tuple[int, Rule]] = []
        self._work: dict[WorkPlace, list[int]] = {}
        #: The storages that are not freed yet, by their address in PyTorch.
        self._live: dict[int, RecordedStorage] = {}
        #: The live storages in host memory, which are not counted, by their address in PyTorch.
        self._host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._tracker = PhaseTracker()
        #: Storages allocated in the forward: those that are alive when the backward begins are
        #: activations.
        self._saved_candidates: list[RecordedStorage] = []
        #: Ids of the parameters that report when their gradient is complete.
        self._hooked: set[int] = set()
        #: Whether a backward of this step has completed a gradient.
        self.has_gradients = False
        #: Where new storages lie; None: where the operator's inputs lie.
        self._placing: Place | None = None

    # ---- called by whoever runs the loop ----

    def load(self, model: torch.nn.Module) -> None:
        """Record the model's parameters and buffers, in its order; again for a copy, or after a move."""
        self._tracker.name_modules(model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            storage = self._record_storage(tensor, "load", module := name.rpartition(".")[0])
            if storage is not None:
                storage.category, storage.where = "parameter", storage.where._replace(module=module)
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)

    def begin_step(self, step: int) -> None:
        self.has_gradients = False
        self._tracker.begin_step(step)

    def savepoint(self) -> Savepoint:
        """Return the present state of the recording, for `restore`."""
        live = {key: (storage, storage.category) for key, storage in self._live.items()}
        work = {place: tuple(sums) for place, sums in self._work.items()}
        kernels = copy.copy(self._kernels)
        host, workspaces = frozenset(self._host), self._workspaces()
        return Savepoint(
            len(self._allocations), len(self._empty_rules), work, live, host, workspaces, kernels
        )

    def restore(self, savepoint: Savepoint) -> bool:
        """Forget what was recorded after the savepoint.

        Returns False, and forgets nothing, if a storage that was live then has been freed, or if
        one that was allocated since then is still live.
        """
        if self._host.keys() != savepoint.host or self._live.keys() != savepoint.live.keys():
            return False
        if any(self._live[key] is not storage for key, (storage, _) in savepoint.live.items()):
            return False
        for storage, category in savepoint.live.values():
            storage.category = category
        for storage in savepoint.workspaces:
            storage.freed_after, storage.freed_at = NEVER, None
        del self._allocations[savepoint.num_allocations :]
        del self._empty_rules[savepoint.num_empty_rules :]
        self._work = {place: list(sums) for place, sums in savepoint.work.items()}
        self._kernels = copy.copy(savepoint.kernels)
        self._tracker.begin("load", 0)
        return True

    @contextmanager
    def creating_state(self) -> Iterator[None]:
        """Count what happens inside as the optimizer's work, also outside of its step function."""
        self._tracker.creates_state = True
        try:
            yield
        finally:
            self._tracker.creates_state = False

    def begin_micro_batch(self) -> None:
        """Begin the next micro-batch, before its input arrives.

        Only a loop of fitune can call this. For other loops, the operators show where a micro-batch
        begins.
        """
        self._tracker.begin_micro_batch()

    def end_step(self, model: torch.nn.Module) -> None:
        """Assign the category of gradients that were set without autograd, and end the step."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._mark_gradient(parameter)
        self._saved_candidates.clear()

    def allocate(
        self, num_bytes: int, category: Category | None, op: str, *, module: str | None = None
    ) -> RecordedStorage:
        """Record an allocation for which no tensor of this process stands.

        module: the module that it belongs to, None for the one that runs
        """
        storage = RecordedStorage(num_bytes, category, self._tracker.where(module), op)
        self._allocations.append(storage)
        return storage

    def free(self, storage: RecordedStorage) -> None:
        storage.freed_after, storage.freed_at = len(self._allocations) - 1, self._tracker.where()

    def empty_cache(self) -> None:
        """Record that the allocator's cache is emptied.

        As in `release_workspaces`, cuBLAS' workspaces are freed too; the next products allocate
        them again.
        """
        for storage in self._workspaces():
            self.free(storage)
        self._kernels.forget_workspaces()
        self.allocate(0, "workspace", "empty_cache")

    def _workspaces(self) -> list[RecordedStorage]:
        """Return the kernels' workspaces that are not freed."""
        return [
            each
            for each in self._allocations
            if each.category == "workspace" and each.num_bytes and not each.freed_at
        ]

    def input_arrived(self, tensor: torch.Tensor) -> None:
        """Assign the category of `tensor`, which was copied from the host.

        In the backward this is an activation that was offloaded, otherwise an input.
        """
        storage = self._record_storage(tensor, "copy")
        if storage is not None and storage.category is None:
            storage.category = "activation" if self._tracker.phase == "backward" else "input"

    @contextmanager
    def placing(self, place: Place) -> Iterator[None]:
        """Place new storages on the host, where they are not counted, or on the card."""
        before, self._placing = self._placing, place
        try:
            yield
        finally:
            self._placing = before

    def running(self, module: str) -> AbstractContextManager[None]:
        """Attribute what happens inside to `module`, which may be a name of its own."""
        return self._tracker.running(module)

    @property
    def is_in_module(self) -> bool:
        """Whether the forward of any module is running."""
        return self._tracker.in_module

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def recording(self, source: Sequence[str]) -> Recording:
        """Return what has been recorded; `source` is as in `MemoryTrace`."""
        return make_recording(
            (
                RecordedAllocation(
                    each.num_bytes,
                    each.category or "temporary",
                    each.where,
                    each.op,
                    each.freed_after,
                    each.freed_at,
                    each.rule,
                )
                for each in self._allocations
            ),
            (TraceWork(*key, *sums) for key, sums in self._work.items()),
            empty_rules=self._empty_rules,
            source=source,
        )

    # ---- operators ----

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and torch would wrap every call to say so
        return False

    def __torch_dispatch__(
        self,
        func: Operator,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            # two thirds of all calls, and slow through FakeTensorMode
            return args[0].fake_device
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.may_be_in_place:
            func = as_autograd_does(
                func, args, kwargs, alone=self._alone, is_new_zeros=self._is_new_zeros
            )
            traits = traits_of(func)
        # before profiler marks are left out: that of zero_grad() begins the next micro-batch
        self._follow_phase(args)
        if traits.is_profiler_mark:
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        result, known = self._kernels.call(func, args, kwargs)
        outputs = (result,) if type(result) is FakeTensor else tuple(tensors_in(result))
        module = self._tracker.running_module()
        if outputs:
            on_host = self._are_outputs_on_host(traits, args, kwargs)
            if on_host:
                for tensor in outputs:
                    self._put_on_host(tensor.untyped_storage())
            else:
                self._allocate(func, args, kwargs, outputs, module)
            written = outputs if traits.does_work else ()
        else:
            # an operator without a result writes in place, as an optimizer's update of all its
            # parameters does
            is_of_lists = bool(args) and isinstance(args[0], (list, tuple))
            written = tuple(tensors_in(args[0])) if is_of_lists else ()
            on_host = bool(written) and self._only_host(args, kwargs)
        if written:
            self._count(func, args, kwargs, written, module=module, known=known, on_host=on_host)
        return result

    def _are_outputs_on_host(
        self, traits: Traits, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> bool:
        if self._placing is not None:
            return self._placing == "host"
        is_of_host = traits.is_of_host and self._kernels.of_card
        return is_of_host or self._only_host(args, kwargs)

    def _allocate(
        self,
        func: Operator,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        outputs: tuple[torch.Tensor, ...],
        module: str,
    ) -> None:
        """Record the outputs and what the kernel allocates besides them, in the kernel's order."""
        name = traits_of(func).name
        modules = [
            module if source is None else source for source in self._sources(args, len(outputs))
        ]
        arguments, steps = self._kernels.allocations(func, args, kwargs) or (None, ())
        named = {step.number for step in steps if isinstance(step, Output)}
        for number, tensor in enumerate(outputs):
            if number not in named:
                self._record_storage(tensor, name, modules[number])
        # a workspace follows the output: a product makes its output first
        for num_bytes in self._kernels.workspaces(func, self._tracker.phase):
            self.allocate(num_bytes, "workspace", name)
        if arguments is None:
            return
        sizes = [step for step in steps if isinstance(step, int)]
        rule = rule_of(func, arguments, total=len(sizes))
        if rule is not None and not sizes:
            self._empty_rules.append((self._tracker.step, rule))
        temporaries: list[RecordedStorage] = []
        at_return = [Free(number) for number in range(len(sizes)) if Free(number) not in steps]
        for step in (*steps, *at_return):
            if isinstance(step, Output) and step.on_host:
                self._put_on_host(outputs[step.number].untyped_storage())
            elif isinstance(step, Output):
                self._record_storage(outputs[step.number], name, modules[step.number])
            elif isinstance(step, Free):
                self.free(temporaries[step.number])
            else:
                storage = self.allocate(step, "temporary", name)
                storage.rule = None if rule is None else rule._replace(position=len(temporaries))
                temporaries.append(storage)

    def _count(
        self,
        func: Operator,
        args: object,
        kwargs: object,
        outputs: tuple[torch.Tensor, ...],
        *,
        module: str,
        known: Call | None,
        on_host: bool = False,
    ) -> None:
        """Add one call of an operator to the sums of its place.

        outputs: the result, or what an operator in place has written
        known: what is remembered of such calls
        on_host: whether the outputs lie in host memory
        """
        work = None if known is None else known.work
        if work is None:
            work = moved_bytes(func, args, outputs), count_flops(func, args, kwargs, outputs)
            if known is not None:
                known.work = work
        name, dtype = traits_of(func).packet_name, dtype_name(outputs[0].dtype)
        may_be_transfer = self._host and name in _COPIES
        if may_be_transfer and any(self.is_on_host(each) != on_host for each in tensors_in(args)):
            name, work = TRANSFER, (bytes_of(outputs), 0)
        elif on_host:
            if not self._tracker.in_optimizer:
                # what a loop prepares on the host while the card works costs no time
                return
            name = f"{ON_HOST}{name}"
        iteration, loop = self._tracker.iteration_of(module)
        tracker = self._tracker
        place = (tracker.phase, tracker.step, tracker.micro_batch, loop, iteration, name, dtype)
        sums = self._work.setdefault(place, [0, 0, 0])
        for i, number in enumerate((1, *work)):
            sums[i] += number

    def _sources(self, args: tuple[object, ...], num_outputs: int) -> Sequence[str | None]:
        """Return the module that each output belongs to, None for the running module.

        Where no module runs, the outputs of an optimizer, and of an operator on whole lists, belong
        to the modules of the tensors that they are computed from.
        """
        by_tensor = bool(args) and (
            self._tracker.phase == "optimizer" or isinstance(args[0], (list, tuple))
        )
        if self._tracker.in_module or not by_tensor:
            return (None,) * num_outputs
        inputs = tuple(tensors_in(args[0]))
        if len(inputs) != num_outputs:
            return (None,) * num_outputs
        found = (self._find(tensor) for tensor in inputs)
        return [None if storage is None else storage.where.module for storage in found]

    def _only_host(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Return whether all tensor arguments lie in host memory; False if there are none."""
        is_host = None
        for tensor in tensors_in((args, tuple(kwargs.values()))) if self._host else ():
            if not (is_host := self.is_on_host(tensor)):
                break
        return bool(is_host)

    def _put_on_host(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live and key not in self._host:
            self._host[key] = weakref.ref(storage, lambda _: self._host.pop(key, None))

    def _record_storage(
        self, tensor: torch.Tensor, op: str, module: str | None = None
    ) -> RecordedStorage | None:
        """Return the record of the tensor's storage, and make one if the storage is new.

        Returns None for storages that are empty, in host memory, or of meta tensors.
        """
        untyped = tensor.untyped_storage()
        key, num_bytes = untyped._cdata, untyped.nbytes()
        known = self._live.get(key)
        if known is not None:
            if known.num_bytes == num_bytes:
                return known
            # the storage was resized in place
            self._storage_freed(key)
        elif key in self._host:
            return None
        if not num_bytes:
            return None
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "meta":
            self._put_on_host(untyped)
            return None
        storage = self.allocate(num_bytes, None, op, module=module)
        if known is not None:
            storage.category = known.category
        storage.reference = weakref.ref(untyped, lambda _: self._storage_freed(key))
        self._live[key] = storage
        self._guess_category(storage)
        return storage

    def _guess_category(self, storage: RecordedStorage) -> None:
        """Assign the category that is known when a storage is allocated.

        Gradients, optimizer state and what the backward needs are recognized later.
        """
        tracker = self._tracker
        if tracker.phase == "load":
            storage.category = storage.category or "input"
        elif tracker.phase == "forward" and not tracker.forward_began and not tracker.in_module:
            storage.category = "input"
        elif tracker.phase == "forward" or (
            tracker.phase == "backward" and torch.is_grad_enabled()
        ):
            self._saved_candidates.append(storage)

    def _storage_freed(self, key: int) -> None:
        storage = self._live.pop(key, None)
        if storage is not None:
            self.free(storage)

    # ---- phases and categories ----

    def _follow_phase(self, args: tuple[object, ...]) -> None:
        """Update the phase, and let the storages that survive until the backward be activations."""
        self._tracker.follow(args)
        if self._saved_candidates and is_in_backward() and not torch.is_grad_enabled():
            for storage in self._saved_candidates:
                is_live = storage.reference is not None and storage.reference() is not None
                if storage.category is None and is_live:
                    storage.category = "activation"
            self._saved_candidates.clear()

    def _mark_gradient(self, parameter: torch.Tensor) -> None:
        self.has_gradients = True
        if parameter.grad is not None and (storage := self._find(parameter.grad)) is not None:
            storage.category = "gradient"

    def _begin_optimizer(self, *_: object) -> None:
        self._tracker.in_optimizer, self._tracker.phase = True, "optimizer"

    def _end_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Assign the category of the optimizer's state after its step function has run."""
        self._tracker.in_optimizer = False
        state = list(optimizer.state.values())
        if self._tracker.creates_state:  # parameter by parameter
            state = [
                optimizer.state.get(each, {})
                for group in optimizer.param_groups
                for each in group["params"]
            ]
        for tensor in tensors_in(state):
            if (storage := self._find(tensor)) is not None and storage.category in (None, "input"):
                storage.category = "optimizer_state"

    def _is_new_zeros(self, tensor: torch.Tensor) -> bool:
        """Return whether an operator that fills its result with zeros allocated the tensor."""
        storage = self._find(tensor)
        return storage is not None and storage.op in _ZEROS

    def _find(self, tensor: torch.Tensor) -> RecordedStorage | None:
        return self._live.get(tensor.untyped_storage()._cdata)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow the forward of all modules and the step function of all optimizers inside."""
        with ExitStack() as stack:
            stack.enter_context(self._tracker.module_hooks())
            for handle in (
                register_optimizer_step_pre_hook(self._begin_optimizer),
                register_optimizer_step_post_hook(self._end_optimizer),
            ):
                stack.callback(handle.remove)
            yield
