"""Which tensors of a loop live on the host and which on the card, while both are CPU tensors for the recorder.

A factory call without a device makes a host tensor, as it does in the real run; the device handed to the loop, or
"cuda" in any spelling, means the card. What is computed from host tensors alone stays on the host. `.to(device)` of a
host tensor is an allocation on the card, `.cpu()` of a card's tensor none. Host tensors have their true values as far
as these come from the host alone: a loop that draws the rows of its batch draws them here too.
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

from fitune.trace.assumptions import known_array, tell_made
from fitune.trace.recorder import Place, Recorder

CARD = torch.device("cpu")
"""What stands for the card, and what every tensor says that it is on."""
HOST = torch.device("cpu", 0)
"""What a loop gets that makes a device "cpu" itself."""


class Placement(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._constructors = _device_constructors()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func in self._constructors or kwargs.get("device") is not None:
            return self._make(func, args, {key: value for key, value in kwargs.items() if key != "pin_memory"})
        if func is Tensor.cuda:
            return self._to_card(args[0], lambda tensor: tensor)
        if func is Tensor.cpu:
            return self._to_host(args[0])
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            return known_array(args[0])
        return func(*args, **kwargs)

    def over(self, hook: Callable[[Any], Any], value: Any) -> Any:
        """Torch calls the hooks of saved tensors outside of any mode; they may be what moves a tensor to the host."""
        if torch._C._len_torch_function_stack():
            return hook(value)
        with self:
            return hook(value)

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        kwargs = {**kwargs, "device": _as_cpu(device)} if device is not None else kwargs
        place: Place = "card" if _is_card(device) else "host"
        with self._recorder.placing(place):
            made = func(*args, **kwargs)
        if place == "host":
            tell_made(made, func, args, kwargs)
        return made

    def _to(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = kwargs.get("device", args[0] if args else None)
        device = named.device if isinstance(named, Tensor) else named
        if not isinstance(device, (str, int, _REAL_DEVICE)):
            return tensor.to(*args, **kwargs)
        rewritten = tuple(_as_cpu(item) for item in args)
        kwargs = {key: _as_cpu(value) for key, value in kwargs.items()}
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


def _is_of_torch(caller: FrameType) -> bool:
    """torch's own code compares the devices of tensors, which are all the same here."""
    return str(caller.f_globals.get("__name__")).startswith("torch.")


class _DeviceOfLoop(type):
    """What a loop finds as `torch.device`: the same, but for "cpu", which is the host."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        device = _REAL_DEVICE(*args, **kwargs)
        return HOST if device == CARD and not _is_of_torch(sys._getframe(1)) else device

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _REAL_DEVICE)


_REAL_DEVICE = torch.device


def _is_card(device: Any) -> bool:
    return device is not None and device != HOST and not (isinstance(device, str) and device.startswith("cpu"))


def _as_cpu(value: Any) -> Any:
    """Any spelling of a CUDA device as the CPU; everything else as it is."""
    if isinstance(value, _REAL_DEVICE) or (isinstance(value, str) and value.startswith("cuda")):
        return CARD
    return CARD if isinstance(value, int) and not isinstance(value, bool) else value


class OnMeta(TorchFunctionMode):
    """A model that is built on the card is built on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cuda, Tensor.cpu):
            return args[0]
        if func is Tensor.to:
            args = (args[0], *(_as_meta(value) for value in args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _as_meta(kwargs["device"])
        return func(*args, **kwargs)


def _as_meta(value: Any) -> Any:
    return torch.device("meta") if _as_cpu(value) is CARD or value == "cpu" else value


@contextmanager
def card_stands_in(recorder: Recorder) -> Iterator[None]:
    """A loop that names CUDA gets the CPU tensors that stand for it."""
    init = torch.amp.autocast_mode.autocast.__init__

    def autocast_init(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu", dtype or torch.float16, *args, **kwargs)  # CUDA's default dtype is float16

    scaler_init = torch.amp.GradScaler.__init__

    def grad_scaler_init(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        scaler_init(self, "cpu", *args, **kwargs)

    generator = torch.Generator
    placement, hooks_init = Placement(recorder), torch.autograd.graph.saved_tensors_hooks.__init__

    def saved_tensors_hooks_init(self: Any, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        hooks_init(self, partial(placement.over, pack), partial(placement.over, unpack))

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # the hooks that checkpointing sets for itself, which are seen to here, are taken for the loop's
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        stack.enter_context(patch.object(torch.amp.autocast_mode.autocast, "__init__", autocast_init))
        stack.enter_context(patch.object(torch.amp.GradScaler, "__init__", grad_scaler_init))
        stack.enter_context(patch.object(torch, "device", _DeviceOfLoop("device", (), {})))
        stack.enter_context(patch.object(torch, "Generator", lambda device="cpu": generator(_as_cpu(device))))
        stack.enter_context(patch.object(torch.cuda, "empty_cache", recorder.empty_cache))
        stack.enter_context(patch.object(torch._C, "_accelerator_emptyCache", recorder.empty_cache, create=True))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_, **__: None))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda tensor, *_, **__: tensor))  # also in a thread
        hooks = torch.autograd.graph.saved_tensors_hooks
        stack.enter_context(patch.object(hooks, "__init__", saved_tensors_hooks_init))
        stack.enter_context(placement)
        yield
