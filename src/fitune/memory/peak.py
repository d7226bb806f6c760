"""What is alive at the peak of a trace, in bytes of PyTorch's *allocated*: whole blocks, so that the parts add up to it.

On a CUDA card the blocks are the `CachingAllocator`'s. On a CPU each storage is what it asked for.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from fitune.memory.allocator import CachingAllocator
from fitune.memory.replay import ReplaySettings
from fitune.trace.events import Category, MemoryEvent, MemoryTrace


@dataclass(frozen=True, slots=True)
class Alive:
    """Storages of one kind that are alive together: same category, module (any of equal layers: `*`) and operator."""

    category: Category
    module: str
    op: str
    num_storages: int
    num_bytes: int


@dataclass(frozen=True)
class Peak:
    """event: the one that reached it. categories: all of `Category`, their sum is allocated_bytes. alive: the largest
    kinds first, their sum is allocated_bytes too. by_step: the highest moment of each step."""

    allocated_bytes: int
    event: MemoryEvent
    categories: Mapping[Category, int]
    alive: tuple[Alive, ...]
    by_step: Mapping[int, int]


def find_peak(trace: MemoryTrace, settings: ReplaySettings | None) -> Peak:
    """The first of the highest moments, by the allocator of `settings`, whose limit must hold it; None: a CPU's live bytes."""
    changes = list(_requested(trace) if settings is None else _blocks(trace, settings))
    total = highest = at = 0
    by_step: dict[int, int] = {}
    for i, (event, change) in enumerate(zip(trace.events, changes, strict=True)):
        by_step[event.step] = max(by_step.get(event.step, total), total + change)
        total += change
        if total > highest:
            highest, at = total, i
    live: dict[int, tuple[MemoryEvent, int]] = {}
    for event, change in zip(trace.events[: at + 1], changes[: at + 1], strict=True):
        if change >= 0 and event.num_bytes >= 0:
            live[event.storage] = (event, change)
        else:
            live.pop(event.storage, None)
    categories: Counter[Category] = Counter(dict.fromkeys(get_args(Category), 0))
    kinds: Counter[tuple[Category, str, str]] = Counter()
    counts: Counter[tuple[Category, str, str]] = Counter()
    for event, num_bytes in live.values():
        categories[event.category] += num_bytes
        kind = (event.category, re.sub(r"\b\d+\b", "*", event.module), event.op)
        kinds[kind] += num_bytes
        counts[kind] += 1
    alive = tuple(Alive(*kind, counts[kind], num_bytes) for kind, num_bytes in kinds.most_common())
    return Peak(highest, trace.events[at], dict(categories), alive, by_step)


def _requested(trace: MemoryTrace) -> Iterator[int]:
    return (event.num_bytes for event in trace.events)


def _blocks(trace: MemoryTrace, settings: ReplaySettings) -> Iterator[int]:
    """By how much each event changes allocated memory."""
    allocator = CachingAllocator(settings.allocator, total_bytes=settings.total_bytes)
    addresses: dict[int, int] = {}
    for event in trace.events:
        before = allocator.allocated_bytes
        if event.num_bytes < 0:
            allocator.free(addresses.pop(event.storage))
        else:
            addresses[event.storage] = allocator.allocate(event.num_bytes, event.stream)
        yield allocator.allocated_bytes - before
