"""Records what a training loop allocates and frees, without a GPU and without weights.

The model is built on the meta device, moved to fake CPU tensors (shapes and dtypes, no data) and
trained for a few steps by the loop's own code under a `Recorder`. With a CUDA target, the process
behaves meanwhile as if it used CUDA. The same recorder runs on real CPU tensors (mode="real").
Tests check that its events are equal to those of fake tensors.
"""

import functools
import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fitune.boundary import cause_of, place_of
from fitune.errors import FituneError, UsageError
from fitune.recorder.as_real import as_real, interrupts_heard, states_kept
from fitune.recorder.assumptions import Assumptions
from fitune.recorder.building import building
from fitune.recorder.card_stand_in import CARD, NAMES_CUDA, NoCard, card_stands_in
from fitune.recorder.cuda_behaviour import CpuKernels, CudaKernels, cuda_behaviour
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import COMPILED, MemoryTrace
from fitune.recorder.failures import explained
from fitune.recorder.flash_package import flash_package
from fitune.recorder.idle_card import cuda_answers
from fitune.recorder.library_patches import is_library_import, when_imported
from fitune.recorder.patience import Patience
from fitune.recorder.recorded_storage import Savepoint
from fitune.recorder.recorder import Recorder
from fitune.recorder.recording import Recording, to_trace
from fitune.recorder.routing import Routing
from fitune.recorder.shape_cache import ShapeMemory

#: Returns the model that is trained.
Build = Callable[[], nn.Module]
Step = Callable[[], Any]
#: (model, device) -> the function that does one step.
Loop = Callable[[nn.Module, torch.device], Step]
Watch = Callable[[Recorder], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """How a training loop is recorded."""

    #: "fake" needs neither memory nor data; "real" runs the loop on CPU tensors
    mode: Literal["fake", "real"] = "fake"
    #: the card whose memory is recorded, None for this machine's CPU
    target: CudaTarget | None = None
    num_steps: int = 3
    #: how a mixture of experts distributes the tokens: evenly, or all to the same experts
    routing: Routing = "balanced"
    #: is called with a model without data, once it is built
    adapt: Callable[[nn.Module], None] | None = None


def record_loop(
    build: Build, loop: Loop, settings: RecordSettings = RecordSettings()
) -> MemoryTrace:
    """Record a training loop as `record_columns` does, and return its events."""
    return to_trace(record_columns(build, loop, settings))


def record_columns(build: Build, loop: Loop, settings: RecordSettings) -> Recording:
    """Record `num_steps` steps of a training loop.

    The model is what `build()` returns, and a step is a call of what `loop(model, device)` returns.
    Raises UsageError for a real recording with a CUDA target, and for a loop that returns no
    function.
    """
    return RecordedModel(build, settings).record(loop, num_steps=settings.num_steps)


class RecordedModel:
    """A model on which several loops are recorded one after the other, each as if it were new.

    prepare: is called once with a new model, and recorded before each loop; its result is
        `prepared`
    shapes: of earlier recordings for the same target, which make these recordings faster
    patience: shared with other models

    Raises what `record_columns` raises.
    """

    def __init__(
        self,
        build: Build,
        settings: RecordSettings,
        *,
        prepare: Callable[[nn.Module], Any] | None = None,
        shapes: ShapeMemory | None = None,
        patience: Patience | None = None,
    ) -> None:
        if settings.mode == "real" and settings.target is not None:
            raise UsageError(
                "a recording on real CPU tensors cannot behave as CUDA: use mode='fake' or target=None"
            )
        self._build, self._settings, self._prepare = build, settings, prepare
        self._shapes = shapes or ShapeMemory()
        self._patience = patience or Patience()
        self._parts: _Parts | None = None
        self.prepared: Any = None

    def record(
        self,
        loop: Loop,
        *,
        num_steps: int,
        watch: Callable[[Recorder], AbstractContextManager[Any]] | None = None,
    ) -> Recording:
        """Record a loop as `record_columns` does.

        watch: is entered with the recorder while the loop runs
        """
        target = self._settings.target
        with ExitStack() as stack:
            compiled = stack.enter_context(process_as_recorded(target, self._patience))
            known = self._parts if self._parts is not None and self._parts.restore() else None
            # None until the recording has succeeded; an old model is freed before a new one is made
            self._parts = None
            parts = known or self._new_parts()
            if parts.mode is not None:
                stack.enter_context(
                    fake_tensors(parts.mode, self._shapes, of_card=target is not None)
                )
            if known is None:
                if parts.mode is not None:
                    if self._settings.adapt is not None:
                        self._settings.adapt(parts.model)
                    fill(parts.model)
                parts.recorder.load(parts.model)
            stack.enter_context(parts.recorder.hooks())
            stack.enter_context(parts.recorder)
            if target is not None:
                stack.enter_context(card_stands_in(parts.recorder))
            if known is None:
                self.prepared = None if self._prepare is None else self._prepare(parts.model)
                parts.save()
            if watch is not None:
                stack.enter_context(watch(parts.recorder))
            with self._explained("setting the loop up", parts):
                step = loop(parts.model, CARD)
            if not callable(step):
                raise UsageError(
                    f"loop(model, device) must return a function that does one step, not {step!r}"
                )
            parts.recorder.load(parts.model)
            for number in range(1, num_steps + 1):
                gc.collect()
                parts.recorder.begin_step(number)
                with self._explained("the step", parts):
                    step()
                parts.recorder.end_step(parts.model)
            # no routing is assumed for real tensors
            assumed = parts.assumptions.used if parts.mode is None else parts.assumptions.lines()
            notes = [COMPILED] if compiled or is_compiled(parts.model) else []
            recording = parts.recorder.recording(
                (*_describe(self._settings, num_steps), *assumed, *notes)
            )
            # what the loop has made is freed before the next loop
            del step
            gc.collect()
            self._parts = parts
            return recording

    def _explained(self, doing: str, parts: "_Parts") -> AbstractContextManager[None]:
        if parts.mode is None:
            return nullcontext()
        return explained(doing, lambda: bool(parts.assumptions.used))

    def _new_parts(self) -> "_Parts":
        assumptions = Assumptions(self._settings.routing, self._shapes, self._patience)
        target, call = self._settings.target, assumptions.call
        recorder = Recorder(CpuKernels(call) if target is None else CudaKernels(target, call))
        if self._settings.mode == "real":
            return _Parts(self._build(), assumptions, recorder, None)
        with building(assumptions), explained("building the model", lambda: bool(assumptions.used)):
            model = self._build()
        return _Parts(model, assumptions, recorder, FakeTensorMode(allow_non_fake_inputs=True))


@dataclass
class _Parts:
    """A model and the objects that record it."""

    model: nn.Module
    assumptions: Assumptions
    recorder: Recorder
    #: None on real tensors
    mode: FakeTensorMode | None
    #: the state before the first loop
    savepoint: Savepoint | None = None
    #: the assumptions that were used before the first loop
    used: dict[str, None] = field(default_factory=dict)

    def save(self) -> None:
        """Take the present state as that before each loop."""
        self.savepoint, self.used = self.recorder.savepoint(), dict(self.assumptions.used)

    def restore(self) -> bool:
        """Return to the saved state.

        Returns False if a loop has left something, or has changed the model.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
        self.assumptions.used = dict(self.used)
        return self.savepoint is not None and self.recorder.restore(self.savepoint)


def fill(model: nn.Module) -> None:
    """Replace the model's meta tensors by empty CPU tensors, which are fake inside FakeTensorMode.

    These are parameters, buffers and plain attributes. What was shared remains shared, and a slice
    of a larger tensor holds all of that tensor's storage.
    """
    replaced: dict[int, torch.Tensor] = {}
    full_storages: dict[int, torch.Tensor] = {}

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            storage = tensor.untyped_storage()
            if storage.nbytes() <= tensor.numel() * tensor.element_size():
                replacement = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            else:
                if storage._cdata not in full_storages:
                    full_storages[storage._cdata] = torch.empty(
                        storage.nbytes(), dtype=torch.uint8, device="cpu"
                    )
                full_storage = full_storages[storage._cdata].view(tensor.dtype)
                replacement = full_storage.as_strided(
                    tensor.shape, tensor.stride(), tensor.storage_offset()
                )
            if isinstance(tensor, nn.Parameter):
                replacement = nn.Parameter(replacement, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = replacement
        return replaced[id(tensor)]

    # ids stay unique while these live
    originals = list(model.parameters()) + list(model.buffers())
    for module in model.modules():
        for tensors in cast(
            tuple[dict[str, Any], ...], (module._parameters, module._buffers, module.__dict__)
        ):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = on_cpu(tensor)
    del originals


@contextmanager
def process_as_recorded(target: CudaTarget | None, patience: Patience) -> Iterator[list[Any]]:
    """Let this process behave as one that uses the target, for as long as the block lasts.

    Yields a list to which everything is added that the block would have compiled.
    """
    with ExitStack() as stack:
        stack.enter_context(patience.recording())
        stack.enter_context(_collected_at_step_ends())
        stack.enter_context(interrupts_heard())
        stack.enter_context(states_kept())
        stack.enter_context(
            patch.object(torch.inference_mode, "__enter__", _enter_without_gradients)
        )
        if target is None:
            stack.enter_context(_explain_cuda_errors())
            stack.enter_context(NoCard())
        else:
            stack.enter_context(cuda_behaviour(target))
            stack.enter_context(flash_package(target))
            stack.enter_context(cuda_answers(target))
        yield stack.enter_context(_without_compilation())


@contextmanager
def fake_tensors(mode: FakeTensorMode, shapes: ShapeMemory, *, of_card: bool) -> Iterator[None]:
    """Make all new tensors of this block fake ones, which pass as real ones."""
    with ExitStack() as stack:
        stack.enter_context(_fake_tensors_pass_as_real(checks_indices=not of_card))
        stack.enter_context(as_real())
        # random numbers on the host are really drawn
        stack.enter_context(torch.random.fork_rng(devices=[]))
        shapes.serve(stack.enter_context(mode))
        yield


@contextmanager
def _without_compilation() -> Iterator[list[Any]]:
    """Let torch.compile and Module.compile do nothing inside.

    What was compiled before runs uncompiled. Everything that was not compiled is put into the list.
    """
    ignored: list[object] = []

    def compile_function(function: Any = None, **_: object) -> object:
        if function is None:
            return compile_function
        if isinstance(function, nn.Module):
            ignored.append(function)
            return function
        # what is compiled when a library is imported need not be a part of the step
        return function if is_library_import() else _noted_once_called(function, ignored)

    def compile_module(module: nn.Module, *_: Any, **__: object) -> None:
        ignored.append(module)

    def uncompiled(callback: Any) -> object:
        if callback not in (None, False):
            ignored.append(callback)
        return None

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "compile", compile_function))
        stack.enter_context(patch.object(nn.Module, "compile", compile_module))
        if (frames := sys.modules.get("torch._dynamo.eval_frame")) is not None:
            stack.enter_context(patch.object(frames, "_callback_from_stance", uncompiled))
            # nobody counts what fullgraph=True compiles
            stack.enter_context(
                patch.object(frames, "set_fullgraph_compiled_frame_count", lambda _: 0, create=True)
            )
        yield ignored


def _noted_once_called(function: Callable[..., object], noted: list[object]) -> object:
    """Return the function, which is put into the list at its first call."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        if not noted:
            noted.append(function)
        return function(*args, **kwargs)

    return call


def is_compiled(model: nn.Module) -> bool:
    """Return whether a part of the model was compiled when it was built."""
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def _describe(settings: RecordSettings, num_steps: int) -> Iterator[str]:
    """Yield the lines of `MemoryTrace.source` on how the loop was recorded."""
    yield f"recorded {num_steps} optimizer steps on {settings.mode} tensors"
    if settings.target is None:
        yield "kernels of this CPU"
    else:
        yield from settings.target.lines()


@contextmanager
def _collected_at_step_ends() -> Iterator[None]:
    """Disable Python's collector inside, which would free reference cycles at arbitrary times."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    # existing objects need not be looked at again
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _explain_cuda_errors() -> Iterator[None]:
    """Raise UsageError for an error that says that there is no CUDA here."""
    try:
        yield
    except FituneError:
        raise
    except Exception as error:
        is_from_cuda = place_of(error).startswith("torch/cuda/")
        is_about_cuda = is_from_cuda or "dummy base class" in str(error)
        if not is_about_cuda and re.search(r"\bcuda\b", str(error), re.IGNORECASE) is None:
            raise
        raise UsageError(f"{NAMES_CUDA} ({cause_of(error)})") from error


def _enter_without_gradients(mode: Any) -> None:
    """Disable gradients in place of entering inference mode; the memory is the same.

    In inference mode, a composite operator reaches the recorder as a whole, which would not see
    what is allocated inside.
    """
    mode._inference_mode_context = torch.set_grad_enabled(not mode.mode)


@contextmanager
def _fake_tensors_pass_as_real(*, checks_indices: bool) -> Iterator[None]:
    """Let PyTorch and transformers treat fake tensors as real ones.

    The code paths for compilers are not taken, and a module converts its parameters in place.
    `Module._apply` would swap fake tensors, which fails while anything refers to them.

    checks_indices: whether one_hot looks at its indices, as a CPU does
    """
    library = torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        library.impl("one_hot", partial(_one_hot, checks_indices=checks_indices), "AutogradCPU")
        for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
            module = import_module(name)
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))
        stack.enter_context(when_imported({"transformers.utils.import_utils": _takes_as_real}))
        stack.enter_context(patch.object(nn.Module, "_apply", _convert_in_place))
        yield


def _takes_as_real(module: Any) -> AbstractContextManager[object]:
    # versions of transformers that lack this function tell no tensors apart
    return patch.object(module, "is_fake_tensor", lambda _: False, create=True)


def _one_hot(tensor: torch.Tensor, num_classes: int = -1, *, checks_indices: bool) -> torch.Tensor:
    """Compute torch.one_hot as the branch for real tensors in Onehot.cpp does.

    A CPU looks at the smallest and the largest index, CUDA at neither.
    """
    if checks_indices:
        smallest, largest = tensor.aminmax()
        smallest.item()
        num_classes = int(largest.item()) + 1 if num_classes == -1 else num_classes
        del smallest, largest
    elif num_classes == -1:
        num_classes = int(tensor.max().item()) + 1
    out = torch.zeros((*tensor.shape, num_classes), dtype=tensor.dtype, device=tensor.device)
    return out.scatter_(-1, tensor.unsqueeze(-1), 1)


def _convert_in_place(
    module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    if recurse:
        for child in module.children():
            child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = convert(parameter)
                if parameter.is_meta and not converted.is_meta:
                    # it cannot take memory, and is replaced as in Module._apply
                    module._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
                elif converted is not parameter:
                    parameter.data = converted
                if parameter.grad is not None:
                    parameter.grad = convert(parameter.grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module
