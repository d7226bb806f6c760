"""Recognises errors that mean that memory ran out, describes them, and frees unused memory."""

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
#: After these errors the device's state is unknown, so nothing that is repeated can be trusted.
_NEVER = re.compile(
    r"illegal memory access|illegal address|device-side assert|unspecified launch failure",
    re.IGNORECASE,
)

_NEEDED = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", re.IGNORECASE)


def memory_failure(error: BaseException) -> Where | None:
    """Return where memory ran out, or None for any other error.

    Causes and contexts are searched too, because libraries wrap exceptions. "device" is the memory
    of tensors, of which a part of the work may need less. "host" is Python's own MemoryError, for
    which that does not help. Torch reports the first by type or, depending on device and library,
    by the text of a RuntimeError: "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory".
    """
    if isinstance(error, FituneError) and not isinstance(error, UsageError):
        # It was classified when it was raised. A UsageError that calls a file unreadable may have
        # been caused by a lack of memory.
        return None
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
    """Return the size of the failed allocation, if the error or one of its causes names it."""
    for each in _causes(error):
        if match := _NEEDED.search(str(each)):
            return parse_bytes(match[1].replace("bytes", "B"))
    return None


def release_memory(device: torch.device) -> None:
    """Give memory that no tensor uses back to the system.

    Call this when the failed work's error, stack frames and tensors are gone, and thus never in an
    `except` block.
    """
    # autograd nodes of custom functions and of gradient checkpointing may form reference cycles
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def release_workspaces(device: torch.device) -> None:
    """Release memory, including cuBLAS's workspaces, which PyTorch never frees by itself."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    release_memory(device)


def said_of(error: BaseException) -> str:
    """Describe the error in one line, and a lack of memory in a few words."""
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
    """Do an action that cannot be split, and repeat it once if memory runs out.

    what: the action as the subject of a sentence.
    way_out: what the user can do, as a clause.

    Raises OutOfMemoryError if the second attempt fails as well.
    """
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
