"""What a loop does with tensors, loaders and interrupts that fake tensors do not answer by themselves.

A loop that prints its loss, copies its model, saves it or reads its rows by worker processes does so here too, with the
same allocations: none for a printed number or a saved file, a clone for a copy, and rows read in this process, since
what worker processes hold is not of the card.
"""

import _thread
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

AGAIN_SECONDS = 0.05


@contextmanager
def as_real() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "__format__", _format))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _deepcopy))
        stack.enter_context(patch.object(torch, "save", _save_nothing))
        stack.enter_context(patch.object(DataLoader, "_get_iterator", _in_this_process))
        yield


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """A Ctrl-C that arrives while Python is in the callback of a weak reference ends there unheard: it comes once more,
    a moment later."""
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def hear(told: Any) -> None:
        if told.exc_type is None or not issubclass(told.exc_type, KeyboardInterrupt):
            before(told)
        elif not any(timer.is_alive() for timer in again):
            again.append(threading.Timer(AGAIN_SECONDS, _thread.interrupt_main))
            again[-1].start()

    with patch.object(sys, "unraisablehook", hear):
        yield
    if any(timer.is_alive() for timer in again):
        for timer in again:
            timer.cancel()
        raise KeyboardInterrupt


def _format(tensor: FakeTensor, spec: str) -> str:
    return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """As Tensor.__deepcopy__; tensors that share memory no longer do."""
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


def _save_nothing(*_: Any, **__: Any) -> None: ...


def _in_this_process(loader: Any) -> Any:
    workers, pins = loader.num_workers, loader.pin_memory
    loader.num_workers, loader.pin_memory = 0, False
    try:
        return _SingleProcessDataLoaderIter(loader)
    finally:
        loader.num_workers, loader.pin_memory = workers, pins
