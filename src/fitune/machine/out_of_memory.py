"""Which errors mean that memory ran out, what they say of it, and giving back what is no longer needed."""

import gc
import re
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

from fitune.errors import FituneError, OutOfMemoryError, UsageError
from fitune.machine.process_memory import trim_heap
from fitune.units import format_bytes, parse_bytes

T = TypeVar("T")

Where = Literal["device", "host"]
_DEVICE = re.compile(
    r"out of memory|_ALLOC_FAILED|cudaErrorMemoryAllocation|DefaultCPUAllocator: (can't allocate|not enough) memory",
    re.IGNORECASE,
)
_NEVER = re.compile(
    r"illegal memory access|illegal address|device-side assert|unspecified launch failure",
    re.IGNORECASE,
)
"""After these the device's state is unknown: nothing that is done again can be believed."""
_NEEDED = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", re.IGNORECASE)


def memory_failure(error: BaseException) -> Where | None:
    """Where memory ran out, or None for any other error. Causes and contexts are looked through, since libraries wrap
    what they catch.

    "device": of the tensors, which giving up a part of the work may cure. "host": Python's own MemoryError, which it
    cannot. Torch reports the first by type or by these words in a RuntimeError, by device and library: "CUDA out of
    memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory".
    """
    if isinstance(error, FituneError) and not isinstance(error, UsageError):
        return None  # it has been judged already; one that calls a file unreadable may be mistaken
    chain = list(_causes(error))
    if any(isinstance(each, RuntimeError) and _NEVER.search(str(each)) for each in chain):
        return None
    for each in chain:
        if isinstance(each, MemoryError):
            return "host"
        if isinstance(each, torch.OutOfMemoryError) or (
            isinstance(each, RuntimeError) and _DEVICE.search(str(each))
        ):
            return "device"
    return None


def needed_bytes(error: BaseException) -> int | None:
    """The allocation that failed, as the error or one of its causes tells it."""
    for each in _causes(error):
        if match := _NEEDED.search(str(each)):
            return parse_bytes(match[1].replace("bytes", "B"))
    return None


def release_memory(device: torch.device) -> None:
    """Give the system back what no tensor uses any more. To be called when the failed work's error, frames and tensors
    are gone, thus never in an `except` block."""
    gc.collect()  # autograd nodes of custom functions and recomputed layers may hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def release_workspaces(device: torch.device) -> None:
    """As `release_memory`, and what cuBLAS was given for ever: on a card there is then no more than tensors hold."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    release_memory(device)


def said_of(error: BaseException) -> str:
    """The error in one line, that memory ran out in a few words."""
    if memory_failure(error) is None:
        return " ".join(str(error).split()) or type(error).__name__
    needed = needed_bytes(error)
    return (
        "out of memory"
        if needed is None
        else f"out of memory, {format_bytes(needed)} at once were missing"
    )


def try_twice(
    action: Callable[[], T],
    *,
    device: torch.device,
    what: str,
    way_out: str = "close other programs",
) -> T:
    """For what is too small to be cut. Raises OutOfMemoryError where the second time fails as well. what: the action as
    the subject of a sentence. way_out: what a person can do, as a clause."""
    for last in (False, True):
        try:
            return action()
        except Exception as error:
            if memory_failure(error) is None:
                raise
            if last:
                needed = needed_bytes(error)
                at_once = "" if needed is None else f" ({format_bytes(needed)} at once)"
                raise OutOfMemoryError(f"{what} found no memory{at_once}: {way_out}") from error
        release_memory(device)
    raise AssertionError


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
