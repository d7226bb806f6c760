"""Replay allocations in C (_fast.c), for PyTorch's default allocator settings on one stream.

It saves the time of `CachingAllocator`, which implements all rules, and to which
tests/allocator/test_plain_replay.py compares it. If no compiler was available when fitune was
installed, `CachingAllocator` is used instead.
"""

from dataclasses import dataclass, replace

import numpy as np

from fitune.allocator.config import AllocatorConfig
from fitune.allocator.rules import (
    MIN_BLOCK_BYTES,
    MIN_LARGE_ALLOCATION_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
)
from fitune.recorder.recording import Integers

#: Stands for no limit, in units of 512 bytes
NO_LIMIT = 1 << 62

#: The allocator's sizes in units of 512 bytes; `_fast` must have been compiled with the same values
CONSTANTS = {
    "UNIT_BYTES": MIN_BLOCK_BYTES,
    "SMALL": SMALL_BYTES // MIN_BLOCK_BYTES,
    "SMALL_SEGMENT": SMALL_SEGMENT_BYTES // MIN_BLOCK_BYTES,
    "MIN_LARGE": MIN_LARGE_ALLOCATION_BYTES // MIN_BLOCK_BYTES,
    "LARGE_SEGMENT": AllocatorConfig().large_segment_bytes // MIN_BLOCK_BYTES,
    "ROUND_LARGE": ROUND_LARGE_BYTES // MIN_BLOCK_BYTES,
}
try:
    from fitune.allocator import _fast
except ImportError:  # installed without a compiler
    IS_COMPILED = False
else:
    IS_COMPILED = {name: getattr(_fast, name, None) for name in CONSTANTS} == CONSTANTS


@dataclass(frozen=True)
class PlainReplay:
    """What the allocator did, up to and including the first allocation that failed."""

    #: by how many bytes each event changed allocated memory
    allocated_changes: Integers
    #: reserved bytes after each event
    reserved_bytes: Integers
    #: indices of the events for which the cache was emptied
    retries_at: Integers
    #: index of the event that failed; None if none did
    failed_at: int | None


def is_plain(config: AllocatorConfig) -> bool:
    """Return whether these are PyTorch's default settings, apart from the memory limit."""
    return replace(config, memory_fraction=1.0) == AllocatorConfig()


def replay_plain(storage: Integers, requested: Integers, *, limit_bytes: int | None) -> PlainReplay:
    """Replay the events in C; requires `IS_COMPILED`.

    storage: for each event, a number from 0 on; no storage is allocated twice.
    requested: the bytes of each event. A free has minus its bytes; 0 bytes empty the cache.
    limit_bytes: the limit of reserved memory.
    """
    num_events = len(requested)
    allocated_changes, reserved_bytes = np.zeros((2, num_events), dtype=np.int64)
    is_retried = np.zeros(num_events, dtype=np.bool_)
    num_done = _fast.replay(
        storage,
        requested,
        allocated_changes=allocated_changes,
        reserved_bytes=reserved_bytes,
        is_retried=is_retried,
        num_storages=int(storage.max(initial=-1)) + 1,
        limit=NO_LIMIT if limit_bytes is None else limit_bytes // MIN_BLOCK_BYTES,
    )
    return PlainReplay(
        allocated_changes=allocated_changes[: num_done + 1],
        reserved_bytes=reserved_bytes[: num_done + 1],
        retries_at=np.flatnonzero(is_retried),
        failed_at=num_done if num_done < num_events else None,
    )
