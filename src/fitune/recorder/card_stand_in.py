"""Track which tensors of a recorded loop are on the host and which on the card.

To the recorder both are CPU tensors. A factory call without a device makes a host tensor, as it
does in the real run; the device that the loop is given, or "cuda" in any spelling, means the card.
What is computed from host tensors only stays on the host. `.to(device)` of a host tensor allocates
on the card, `.cpu()` of a tensor on the card does not. Host tensors have their true values where
these depend on the host only: a loop that draws random indices for its batch draws them here too.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from fitune.errors import UsageError
from fitune.recorder.known_data import set_factory_data
from fitune.recorder.recorder import Place, Recorder

NAMES_CUDA = (
    "the loop names CUDA and is predicted for a CPU: let it use the device that it is given, or "
    "name a card, such as "
    'gpu="RTX 4090"'
)
#: The device that stands for the card; torch itself sees it as the device of every tensor
CARD = torch.device("cpu")
#: The device that a tensor on the card reports to the loop and the model, and that they may pass on
REPORTED_CARD = torch.device("cuda", 0)
#: The device that a loop gets if it makes a device "cpu"
HOST = torch.device("cpu", 0)
#: Tensors on this device have no memory, on the card or on the host
_META = torch.device("meta")


class Placement(TorchFunctionMode):
    """A function mode that places each tensor on the host or on the card."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._constructors = _device_constructors()
        self.default_device: Any = None

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if (
            self.default_device is not None
            and func in self._constructors
            and kwargs.get("device") is None
        ):
            kwargs = {**kwargs, "device": self.default_device}
        if func is Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func in self._constructors or kwargs.get("device") is not None:
            return self._make(
                func, args, {key: value for key, value in kwargs.items() if key != "pin_memory"}
            )
        if func is Tensor.cuda:
            return self._to_card(args[0], lambda tensor: tensor)
        if func is Tensor.cpu:
            return self._to_host(args[0])
        if func in _DEVICE_QUERIES and not _is_of_torch(sys._getframe(1)):
            is_card = self._is_on_card(args[0])
            return (0 if is_card else -1) if func is Tensor.get_device else is_card
        return func(*args, **kwargs)

    def reported_device(self, tensor: FakeTensor) -> torch.device:
        """Return FakeTensor.device as the caller should see it.

        A loop or a model gets the device where the tensor is in the real run, torch itself the
        device of the recording. So does every caller inside of an operator and in hooks of the
        backward, where no mode would translate the device back.
        """
        if tensor.fake_device == _META:
            return _META
        if not torch._C._len_torch_function_stack() or _is_of_torch(sys._getframe(1)):
            return (
                torch.device("meta")
                if tensor.fake_mode.in_kernel_invocation
                else tensor.fake_device
            )
        return REPORTED_CARD if self._is_on_card(tensor) else HOST

    def _is_on_card(self, tensor: Tensor) -> bool:
        return isinstance(tensor, FakeTensor) and not self._recorder.is_on_host(tensor)

    def call_hook(self, hook: Callable[[object], object], value: object) -> Any:
        """Call a saved-tensor hook in this mode.

        Torch calls these hooks outside of any mode, but they may move a tensor to the host.
        """
        if torch._C._len_torch_function_stack():
            return hook(value)
        with self:
            return hook(value)

    def _make(self, func: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        device = kwargs.get("device")
        kwargs = {**kwargs, "device": as_cpu(device)} if device is not None else kwargs
        if func in _FROM_NUMBERS and args and (numbers := _first_tensor(args[0])) is not None:
            # torch reads each tensor of a list in its memory
            kwargs = {"dtype": numbers.dtype, **kwargs}
            args = (tree_map_only(FakeTensor, lambda each: each.tolist(), args[0]), *args[1:])
        place: Place = "card" if _is_card(device) else "host"
        with self._recorder.placing(place):
            made = func(*args, **kwargs)
        if place == "host" and not _is_meta(device):
            set_factory_data(made, func, args, kwargs)
        return made

    def _to(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = kwargs.get("device", args[0] if args else None)
        device = named.device if isinstance(named, Tensor) else named
        if not isinstance(device, (str, int, _REAL_DEVICE)):
            return tensor.to(*args, **kwargs)
        rewritten = tuple(as_cpu(item) for item in args)
        kwargs = {key: as_cpu(value) for key, value in kwargs.items()}
        if not _is_card(device):
            return self._to_host(tensor.to(*rewritten, **kwargs))
        return self._to_card(tensor, lambda source: source.to(*rewritten, **kwargs))

    def _to_card(self, tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        if isinstance(tensor, FakeTensor) and not self._recorder.is_on_host(tensor):
            return convert(tensor)
        with self._recorder.placing("host"):
            source = convert(tensor)
        with self._recorder.placing("card"):
            copied = source.clone()
        self._recorder.input_arrived(copied)
        return copied

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._recorder.is_on_host(tensor):
            return tensor
        with self._recorder.placing("host"):
            return tensor.clone()


_FROM_NUMBERS = (torch.tensor, torch.as_tensor)


def _first_tensor(data: object) -> FakeTensor | None:
    """Return the first number of nested lists if it is a tensor; data itself is no list then."""
    first = data
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return first if first is not data and isinstance(first, FakeTensor) else None


_DEVICE_QUERIES = (Tensor.is_cuda.__get__, Tensor.get_device)  # type: ignore[attr-defined]


def _is_of_torch(caller: FrameType) -> bool:
    """Return whether the caller is torch or fitune.

    They compare the devices of tensors, which are all the same during a recording.
    """
    return str(caller.f_globals.get("__name__")).startswith(("torch.", "fitune."))


class _DeviceOfLoop(type):
    """Replaces `torch.device` for a loop: the same type, except that "cpu" makes `HOST`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> object:
        if len(args) == 1 and isinstance(args[0], int):
            # a number is one of the accelerator, which a CPU build of torch does not have
            args = ("cuda", *args)
        device = _REAL_DEVICE(*args, **kwargs)
        return HOST if device == CARD and not _is_of_torch(sys._getframe(1)) else device

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _REAL_DEVICE)


_REAL_DEVICE = torch.device
_parse_to_of_torch: Callable[..., object] = torch._C._nn._parse_to


def _parse_to(*args: object, **kwargs: object) -> object:
    """Read the arguments of Module.to, which makes a device of a name, with "cpu" for the host."""
    args = tuple(HOST if isinstance(each, str) and each == "cpu" else each for each in args)
    if kwargs.get("device") == "cpu":
        kwargs = {**kwargs, "device": HOST}
    return _parse_to_of_torch(*args, **kwargs)


def _is_card(device: object) -> bool:
    return (
        device is not None
        and device != HOST
        and not (isinstance(device, str) and device.startswith("cpu"))
        and not _is_meta(device)
    )


def _is_meta(device: object) -> bool:
    return device in ("meta", _META)


def as_cpu(value: object) -> Any:
    """Return `CARD` for any spelling of a CUDA device, and any other value unchanged."""
    if _is_meta(value):
        return value
    if isinstance(value, _REAL_DEVICE) or (isinstance(value, str) and value.startswith("cuda")):
        return CARD
    return CARD if isinstance(value, int) and not isinstance(value, bool) else value


class NoCard(TorchFunctionMode):
    """A function mode for recordings of a CPU that refuses CUDA devices.

    Torch has no tensors there, and may abort. Tensors that the loop makes have their true values,
    as host tensors have in a recording of a card.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constructors = _device_constructors()

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        named = (kwargs.get("device"), *(args[1:2] if func is Tensor.to else ()))
        if func is Tensor.cuda or any(
            isinstance(each, str | torch.device) and "cuda" in str(each) for each in named
        ):
            raise UsageError(NAMES_CUDA)
        made = func(*args, **kwargs)
        if func in self._constructors and isinstance(made, FakeTensor):
            set_factory_data(made, func, args, kwargs)
        return made


@contextmanager
def card_stands_in(recorder: Recorder) -> Iterator[None]:
    """Give a loop that names CUDA the CPU tensors that stand for the card."""
    init = torch.amp.autocast_mode.autocast.__init__

    def autocast_init(
        self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any
    ) -> None:
        # CUDA's default dtype is float16.
        init(self, "cpu", dtype or torch.float16, *args, **kwargs)

    scaler_init = torch.amp.GradScaler.__init__

    def grad_scaler_init(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        scaler_init(self, "cpu", *args, **kwargs)

    generator = torch.Generator

    class GeneratorType(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return generator(as_cpu(device))

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, generator)

    class Generator(metaclass=GeneratorType):
        """Stands for a CUDA generator but draws on the CPU; libraries use it with isinstance."""

    placement, hooks_init = Placement(recorder), torch.autograd.graph.saved_tensors_hooks.__init__

    def saved_tensors_hooks_init(
        self: Any, pack: Callable[[object], object], unpack: Callable[[object], object]
    ) -> None:
        hooks_init(self, partial(placement.call_hook, pack), partial(placement.call_hook, unpack))

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Checkpointing sets hooks of its own, which go through the replaced __init__. Torch takes
        # them for the loop's hooks and would warn about them.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        stack.enter_context(
            patch.object(torch.amp.autocast_mode.autocast, "__init__", autocast_init)
        )
        stack.enter_context(patch.object(torch.amp.GradScaler, "__init__", grad_scaler_init))
        stack.enter_context(patch.object(FakeTensor, "device", property(placement.reported_device)))
        stack.enter_context(patch.object(torch, "device", _DeviceOfLoop("device", (), {})))
        stack.enter_context(patch.object(torch._C._nn, "_parse_to", _parse_to))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(_default_device(placement))
        stack.enter_context(patch.object(torch.cuda, "empty_cache", recorder.empty_cache))
        stack.enter_context(
            patch.object(torch._C, "_accelerator_emptyCache", recorder.empty_cache, create=True)
        )
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_, **__: None))
        hooks = torch.autograd.graph.saved_tensors_hooks
        stack.enter_context(patch.object(hooks, "__init__", saved_tensors_hooks_init))
        stack.enter_context(placement)
        yield


@contextmanager
def _default_device(placement: Placement) -> Iterator[None]:
    """Let the placement handle torch.set_default_device.

    It may be called before the recording or in the loop. Torch's own mode would make tensors on a
    card that is not there.
    """

    def set_default(device: object) -> None:
        placement.default_device = device

    def get_default() -> torch.device:
        return (
            torch.device("cpu")
            if placement.default_device is None
            else torch.device(placement.default_device)
        )

    # torch.get_default_device() would make a tensor, and fail without a card.
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    before = None if context is None else context.device
    torch.set_default_device(None)
    placement.default_device = before if before is not None and before.type == "cuda" else None
    try:
        with (
            patch.object(torch, "set_default_device", set_default),
            patch.object(torch, "get_default_device", get_default),
        ):
            yield
    finally:
        torch.set_default_device(before)
