"""The replay of an allocator with PyTorch's default settings, on one stream, in C (_fast.c).

It is 33 times as fast as `CachingAllocator`, which knows all rules, and against which tests/memory/test_fast.py
holds it. Where no compiler was there when fitune was installed, `CachingAllocator` does the work.
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
from fitune.trace.recording import Integers

NO_LIMIT = 1 << 62

CONSTANTS = {
    "UNIT_BYTES": MIN_BLOCK_BYTES,
    "SMALL": SMALL_BYTES // MIN_BLOCK_BYTES,
    "SMALL_SEGMENT": SMALL_SEGMENT_BYTES // MIN_BLOCK_BYTES,
    "MIN_LARGE": MIN_LARGE_ALLOCATION_BYTES // MIN_BLOCK_BYTES,
    "LARGE_SEGMENT": AllocatorConfig().large_segment_bytes // MIN_BLOCK_BYTES,
    "ROUND_LARGE": ROUND_LARGE_BYTES // MIN_BLOCK_BYTES,
}
"""Those of the rules, in units of 512 bytes: what the loop in C was compiled with."""
try:
    from fitune.allocator import _fast
except ImportError:  # installed without a compiler
    IS_COMPILED = False
else:
    IS_COMPILED = {name: getattr(_fast, name, None) for name in CONSTANTS} == CONSTANTS


@dataclass(frozen=True)
class PlainReplay:
    """What the allocator did, up to the first allocation that fails, that one included."""

    #: by how many bytes each event changed what is allocated
    allocated_changes: Integers
    #: after each event
    reserved_bytes: Integers
    #: the events for which the cache was emptied
    retries_at: Integers
    #: the event that failed
    failed_at: int | None


def is_plain(config: AllocatorConfig) -> bool:
    """Whether these are PyTorch's default settings, but for the memory limit."""
    return replace(config, memory_fraction=1.0) == AllocatorConfig()


def replay_plain(storage: Integers, requested: Integers, *, limit_bytes: int | None) -> PlainReplay:
    """Replay the events in C, which must be compiled.

    storage: a number from 0 on for each event, allocated once. requested: the bytes of each event; a free has minus its
    bytes, and 0 bytes empty the cache. limit_bytes: of reserved memory.
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
