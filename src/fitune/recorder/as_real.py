"""Make tensors, data loaders and interrupts behave in a recording as they do in the real run.

A loop may print its loss, copy its model, save it or read its samples in worker processes. It can
do so in a recording too, with the same allocations on the card: none for a printed number or a
saved file, and a clone for a copy. Samples are read in this process, since the memory of worker
processes is not on the card.
"""

import _thread
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader

from fitune.recorder.known_data import data_of, known_array
from fitune.recorder.library_patches import when_imported
from fitune.recorder.weight_files import on_host, weight_files

#: After this time a lost interrupt is raised again
AGAIN_SECONDS = 0.05
#: Packages whose kernels take addresses
_READ_MEMORY = ("bitsandbytes", "triton", "flash_attn", "xformers", "apex", "ctypes")
_read_all = FakeTensor.tolist
#: Unknown elements of a tensor that are read one by one; of a larger one, all are taken to be alike
_MOST_READ = 2**12
#: The functions that some version of safetensors calls to save, with what they return here, where
#: nothing is saved
_SAFETENSORS: dict[str, object] = {
    "_flatten": {},
    "_flatten_as_ptr": {},
    "serialize": b"",
    "serialize_file": None,
}


@contextmanager
def as_real() -> Iterator[None]:
    """Replace what fake tensors do not support by themselves, for as long as the block lasts."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "__format__", _format))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _deepcopy))
        stack.enter_context(patch.object(FakeTensor, "numpy", _numpy, create=True))
        stack.enter_context(patch.object(FakeTensor, "tolist", _tolist, create=True))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", _data_ptr, create=True))
        stack.enter_context(patch.object(torch, "save", partial(_save_nothing, None)))
        # Data loaders pin memory in threads, which function modes do not reach.
        pin = patch.object(torch.Tensor, "pin_memory", lambda tensor, *_, **__: tensor)
        stack.enter_context(pin)
        stack.enter_context(when_imported({"safetensors.torch": _saves_nothing}))
        stack.enter_context(weight_files(_on_device))
        begin = DataLoader.__iter__
        stack.enter_context(
            patch.object(DataLoader, "__iter__", lambda loader: _in_this_process(loader, begin))
        )
        yield


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """Raise a KeyboardInterrupt again that Python lost.

    An interrupt that arrives while Python runs the callback of a weak reference is only printed. It
    is raised again a moment later.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def hear(unraisable: Any) -> None:
        kind = unraisable.exc_type
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            before(unraisable)
        elif not any(timer.is_alive() for timer in again):
            again.append(threading.Timer(AGAIN_SECONDS, _thread.interrupt_main))
            again[-1].start()

    with patch.object(sys, "unraisablehook", hear):
        yield
    if any(timer.is_alive() for timer in again):
        for timer in again:
            timer.cancel()
        raise KeyboardInterrupt


@contextmanager
def states_kept() -> Iterator[None]:
    """Restore accelerate's state, which stores for the whole process which device it found."""
    name = "accelerate.state"
    before = [dict(each) for each in _shared_states(sys.modules.get(name))]
    try:
        yield
    finally:
        for number, state in enumerate(_shared_states(sys.modules.get(name))):
            state.clear()
            state.update(before[number] if before else {})


def _shared_states(module: object) -> list[dict[str, object]]:
    names = ("PartialState", "AcceleratorState", "GradientState")
    return [] if module is None else [getattr(module, name)._shared_state for name in names]


def _format(tensor: FakeTensor, spec: str) -> str:
    return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _deepcopy(tensor: FakeTensor, memo: dict[int, object]) -> object:
    """Copy as Tensor.__deepcopy__ does; copies of tensors that share memory do not share it."""
    if id(tensor) in memo:
        return memo[id(tensor)]
    if not tensor.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment"
        )
    with torch.no_grad():
        copied: Any = tensor.clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    else:
        copied.requires_grad_(tensor.requires_grad)
    if tensor.grad is not None:
        copied.grad = _deepcopy(tensor.grad, memo)  # type: ignore[arg-type]
    memo[id(tensor)] = copied
    return copied


def _on_device(tensor: torch.Tensor, device: object) -> torch.Tensor:
    return tensor.to(device) if isinstance(device, (str, int, torch.device)) else tensor


def _numpy(tensor: FakeTensor, *_: object, **__: object) -> object:
    if tensor.requires_grad:
        raise RuntimeError(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    return known_array(tensor)


def _data_ptr(tensor: FakeTensor) -> int:
    """Return a number that differs between tensors, by which scripts tell shared ones apart.

    Libraries with kernels of their own, which would read from there, get the usual error.
    """
    caller = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0]
    if caller in _READ_MEMORY:
        return torch.Tensor.data_ptr(tensor)
    offset = tensor.storage_offset() * tensor.element_size()
    return int(tensor.untyped_storage()._cdata) + int(offset)


def _tolist(tensor: FakeTensor) -> object:
    """Return what Tensor.tolist returns; indices that are known need not be read one by one."""
    if (data := data_of(tensor)) is not None:
        with on_host():
            return data.tolist()
    if tensor.numel() <= _MOST_READ:
        return _read_all(tensor)
    return np.full(tensor.shape, tensor.reshape(-1)[0].item()).tolist()


def _saves_nothing(safetensors_torch: object) -> AbstractContextManager[object]:
    stack = ExitStack()
    for name, saved in _SAFETENSORS.items():
        stack.enter_context(
            patch.object(safetensors_torch, name, partial(_save_nothing, saved), create=True)
        )
    return stack


def _save_nothing(saved: object, *_: object, **__: object) -> object:
    return saved


#: What a loader has for worker processes -> its value without any
_NO_WORKERS = {"num_workers": 0, "pin_memory": False, "timeout": 0}


def _in_this_process(loader: Any, begin: Callable[..., object]) -> object:
    """Return an iterator without workers; libraries have loaders with iterators of their own."""
    before = {name: getattr(loader, name) for name in _NO_WORKERS}
    vars(loader).update(_NO_WORKERS)
    try:
        return begin(loader)
    finally:
        vars(loader).update(before)
