"""Read the numbers of PyTorch's message that a card ran out of memory, and what follows from them.

The message of torch.OutOfMemoryError (c10/cuda/CUDACachingAllocator.cpp) says what was asked for,
what the card holds and what PyTorch holds of it. Versions before 2.1 word it otherwise.
"""

import re
from dataclasses import dataclass

from fitune.errors import UsageError
from fitune.units import parse_bytes

_SIZE = r"([\d.]+ ?(?:bytes|[KMGT]i?B))"
#: field -> the wordings of all versions
_WORDINGS = {
    "asked_bytes": (rf"Tried to allocate {_SIZE}",),
    "total_bytes": (rf"total capacity of {_SIZE}", rf"{_SIZE} total capacity"),
    "free_bytes": (rf"of which {_SIZE} is free", rf"{_SIZE} free"),
    "process_bytes": (rf"this process has {_SIZE} memory in use",),
    "allocated_bytes": (rf"{_SIZE} is allocated by PyTorch", rf"{_SIZE} already allocated"),
    "unused_bytes": (rf"{_SIZE} is reserved by PyTorch but unallocated",),
    "reserved_bytes": (rf"{_SIZE} reserved in total by PyTorch",),
    "limit_bytes": (rf"{_SIZE} allowed",),
}
_OTHER_PROCESS = re.compile(rf"Process \d+ has {_SIZE} memory in use", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class OomMessage:
    """What the message says; None for what this version of PyTorch leaves out."""

    #: the size of the allocation that failed
    asked_bytes: int
    #: the memory of the card
    total_bytes: int | None = None
    #: what no process uses on the card
    free_bytes: int | None = None
    #: what this process uses on the card, with CUDA's own memory
    process_bytes: int | None = None
    #: in tensors
    allocated_bytes: int | None = None
    #: what PyTorch holds in its cache and no tensor uses
    unused_bytes: int | None = None
    #: what other processes use on the card
    others_bytes: int = 0
    #: the most that this process may reserve, where it was limited
    limit_bytes: int | None = None

    @property
    def is_fragmented(self) -> bool:
        """Whether the cache holds enough for the allocation, but in pieces that are too small."""
        return self.unused_bytes is not None and self.unused_bytes >= self.asked_bytes

    @property
    def outside_bytes(self) -> int | None:
        """What this process uses besides PyTorch's allocator: CUDA's context and other libraries."""
        process, allocated, unused = self.process_bytes, self.allocated_bytes, self.unused_bytes
        if process is None or allocated is None or unused is None:
            return None
        return max(process - allocated - unused, 0)

    @property
    def missing_bytes(self) -> int | None:
        """How much more was needed than was free."""
        return None if self.free_bytes is None else max(self.asked_bytes - self.free_bytes, 0)


def read_oom_message(text: str) -> OomMessage:
    """Read a message, with any text around it. Raises UsageError if there is none in the text."""
    joined = " ".join(text.split())
    found: dict[str, int] = {}
    for field, wordings in _WORDINGS.items():
        for wording in wordings:
            if match := re.search(wording, joined, re.IGNORECASE):
                found[field] = _bytes(match[1])
                break
    if "asked_bytes" not in found:
        raise UsageError(
            "there is no 'CUDA out of memory. Tried to allocate ...' in this text: give the whole "
            "message of torch.OutOfMemoryError"
        )
    reserved = found.pop("reserved_bytes", None)
    if reserved is not None and "allocated_bytes" in found:
        found["unused_bytes"] = max(reserved - found["allocated_bytes"], 0)
    others = sum(_bytes(match) for match in _OTHER_PROCESS.findall(joined))
    return OomMessage(**found, others_bytes=others)


def _bytes(text: str) -> int:
    return parse_bytes(text.replace("bytes", "B"))
