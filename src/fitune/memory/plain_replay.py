"""The rules of `CachingAllocator` that are at work in an allocator as it comes, on one stream, in one tight loop.

The loop is written twice: in C (_plain_replay.c), and in Python for where no compiler was at hand when fitune was
installed. Sizes and addresses are counted in units of 512 bytes. tests/memory/test_plain_replay.py holds both loops
against the allocator that knows all rules.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fitune.memory.allocator import (
    MIN_BLOCK_BYTES,
    MIN_LARGE_ALLOCATION_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
)
from fitune.memory.allocator_config import AllocatorConfig
from fitune.trace.recording import Integers

NO_LIMIT = 1 << 62
_ADDRESS_BITS = 40
_SMALL = SMALL_BYTES // MIN_BLOCK_BYTES
_SMALL_SEGMENT = SMALL_SEGMENT_BYTES // MIN_BLOCK_BYTES
_MIN_LARGE = MIN_LARGE_ALLOCATION_BYTES // MIN_BLOCK_BYTES
_LARGE_SEGMENT = AllocatorConfig().large_segment_bytes // MIN_BLOCK_BYTES
_ROUND_LARGE = ROUND_LARGE_BYTES // MIN_BLOCK_BYTES


@dataclass(frozen=True)
class PlainReplay:
    """Up to the first allocation that fails, that one included. allocated_changes: by how many bytes each event changed
    what is allocated. reserved_bytes: after each event. retries_at: the events for which the cache was emptied.
    failed_at: the event that failed."""

    allocated_changes: Integers
    reserved_bytes: Integers
    retries_at: Integers
    failed_at: int | None


class _Block:
    """A block in the chain of its segment. free: the list of the free blocks of its pool, while it is one of them."""

    __slots__ = ("address", "after", "before", "is_free", "num_units", "pool")

    def __init__(
        self, address: int, num_units: int, pool: list[int], before: "_Block | None", after: "_Block | None"
    ) -> None:
        self.address, self.num_units, self.pool = address, num_units, pool
        self.before, self.after, self.is_free = before, after, False


def is_plain(config: AllocatorConfig) -> bool:
    """Whether it is PyTorch's own but for the limit."""
    return replace(config, memory_fraction=1.0) == AllocatorConfig()


def replay_plain(storage: Integers, requested: Integers, *, limit_bytes: int | None) -> PlainReplay:
    """storage, requested: of the events; a free has minus its bytes, 0 bytes empty the cache. A storage is a number
    from 0 on, allocated once. limit_bytes: of reserved memory."""
    num_events = len(requested)
    allocated_changes, reserved_bytes = np.zeros((2, num_events), dtype=np.int64)
    is_retried = np.zeros(num_events, dtype=np.bool_)
    num_done = replay_loop(
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


def replay_in_python(
    storage: Integers,
    requested: Integers,
    *,
    allocated_changes: Integers,
    reserved_bytes: Integers,
    is_retried: npt.NDArray[np.bool_],
    num_storages: int,
    limit: int,
) -> int:
    """How many events were carried out: all, or those before the one that failed. Writes
    `allocated_changes`, `reserved_bytes` and `is_retried`, which are zeros before. limit: units."""
    small: list[int] = []  # free blocks, size << 40 | address
    large: list[int] = []
    free: dict[int, _Block] = {}
    blocks: list[_Block | None] = [None] * num_storages
    spare: list[_Block] = []  # absorbed by a neighbour: the next ones to be cut off
    changes = [0] * len(requested)
    reserved = next_address = 0
    num_done = len(requested)
    reserved_from = [(0, 0)]  # which event on

    def empty_cache() -> int:
        """Units given back."""
        whole = [(key, each) for key, each in free.items() if each.before is None and each.after is None]
        for key, each in whole:
            del free[key], each.pool[bisect_left(each.pool, key)]
        return sum(each.num_units for _, each in whole)

    units = np.where(requested > 0, -(-requested // MIN_BLOCK_BYTES), requested)
    for i, (name, size) in enumerate(zip(storage.tolist(), units.tolist(), strict=True)):
        if size > 0:
            pool = small if size <= _SMALL else large
            at = bisect_left(pool, size << _ADDRESS_BITS)
            if at < len(pool):
                block = free.pop(pool[at])
                block.is_free = False
            else:
                if size <= _SMALL:
                    segment = _SMALL_SEGMENT
                else:
                    segment = _LARGE_SEGMENT if size < _MIN_LARGE else -(-size // _ROUND_LARGE) * _ROUND_LARGE
                if reserved + segment > limit:
                    reserved -= empty_cache()
                    is_retried[i] = True
                    if reserved + segment > limit:
                        num_done = i
                        reserved_from.append((i, reserved))
                        break
                reserved += segment
                reserved_from.append((i, reserved))
                block = _Block(next_address, segment, pool, None, None)
                at = len(pool)
                pool.append(segment << _ADDRESS_BITS | next_address)
                next_address += segment
            remaining = block.num_units - size
            if remaining > _SMALL or (remaining and pool is small):
                after = block.after
                if spare:
                    rest = spare.pop()
                    rest.address, rest.num_units, rest.pool = block.address + size, remaining, pool
                    rest.before, rest.after = block, after
                else:
                    rest = _Block(block.address + size, remaining, pool, block, after)
                rest.is_free = True
                if after is not None:
                    after.before = rest
                block.after = rest
                block.num_units = size
                key = remaining << _ADDRESS_BITS | rest.address
                free[key] = rest
                if at and pool[at - 1] > key:
                    del pool[at]
                    insort(pool, key, 0, at)
                else:
                    pool[at] = key
            else:
                del pool[at]
                size = block.num_units
            blocks[name] = block
            changes[i] = size
        elif size < 0:
            found = blocks[name]
            if found is None:
                continue
            blocks[name] = None
            changes[i] = -found.num_units
            block, pool, at = found, found.pool, -1
            before, after = block.before, block.after
            if before is not None and before.is_free:
                key = before.num_units << _ADDRESS_BITS | before.address
                del free[key]
                at = bisect_left(pool, key)
                before.num_units += block.num_units
                before.after = after
                if after is not None:
                    after.before = before
                spare.append(block)
                block = before
            if after is not None and after.is_free:
                key = after.num_units << _ADDRESS_BITS | after.address
                del free[key]
                its = bisect_left(pool, key)
                if at < 0:
                    at = its
                else:
                    del pool[its]
                    at -= its < at
                block.num_units += after.num_units
                block.after = after.after
                if after.after is not None:
                    after.after.before = block
                spare.append(after)
            block.is_free = True
            key = block.num_units << _ADDRESS_BITS | block.address
            free[key] = block
            if at < 0:
                insort(pool, key)
            elif at + 1 == len(pool) or pool[at + 1] > key:
                pool[at] = key
            else:
                del pool[at]
                insort(pool, key, at)
        else:
            reserved -= empty_cache()
            reserved_from.append((i, reserved))
    allocated_changes[:] = np.array(changes, dtype=np.int64) * MIN_BLOCK_BYTES
    for (i, reserved), (end, _) in pairwise([*reserved_from, (num_done + 1, 0)]):
        reserved_bytes[i:end] = reserved * MIN_BLOCK_BYTES
    return num_done


try:
    from fitune.memory._plain_replay import replay as replay_loop
except ImportError:
    replay_loop = replay_in_python
