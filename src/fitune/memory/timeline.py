"""From a trace to the live bytes of each category over time, and what is alive at the peaks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from fitune.errors import UsageError
from fitune.trace.events import Category, MemoryEvent, MemoryTrace, Phase

CATEGORIES: tuple[Category, ...] = get_args(Category)
NUM_TOP = 10


@dataclass(frozen=True, slots=True)
class Living:
    """Something alive at a peak: a module (`op` is empty) or a tensor."""

    name: str
    op: str
    category: Category | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The first highest point: after event `event`. categories add up to num_bytes; modules and tensors are the largest
    ones alive, largest first."""

    event: int
    step: int
    phase: Phase
    num_bytes: int
    categories: Mapping[Category, int]
    modules: tuple[Living, ...]
    tensors: tuple[Living, ...]


@dataclass(frozen=True)
class MemoryTimeline:
    """categories: live bytes after each event, int64 [events]; total_bytes is their sum. peak: of the whole trace and
    of its last step."""

    categories: Mapping[Category, npt.NDArray[np.int64]]
    total_bytes: npt.NDArray[np.int64]
    peak: Peak
    last_step_peak: Peak


def timeline(trace: MemoryTrace, *, block_bytes: Mapping[int, int] | None = None) -> MemoryTimeline:
    """Live bytes over the trace's events. block_bytes: what each storage took in an allocator (`ReplayResult`); without
    it the requested bytes are counted. Raises UsageError for a trace without events."""
    if not trace.events:
        raise UsageError("the trace holds no event: nothing was allocated while it was recorded")
    sizes = np.array([_bytes(event, block_bytes) for event in trace.events], dtype=np.int64)
    category_of = np.array([CATEGORIES.index(event.category) for event in trace.events], dtype=np.int8)
    categories = {
        category: np.cumsum(np.where(category_of == number, sizes, 0)) for number, category in enumerate(CATEGORIES)
    }
    total_bytes = np.cumsum(sizes)
    last_step = max(event.step for event in trace.events)
    first = next(i for i, event in enumerate(trace.events) if event.step == last_step)
    return MemoryTimeline(
        categories=categories,
        total_bytes=total_bytes,
        peak=_peak(trace, int(np.argmax(total_bytes)), block_bytes),
        last_step_peak=_peak(trace, first + int(np.argmax(total_bytes[first:])), block_bytes),
    )


def _bytes(event: MemoryEvent, block_bytes: Mapping[int, int] | None) -> int:
    if block_bytes is None:
        return event.num_bytes
    block = block_bytes.get(event.storage, 0)
    return block if event.num_bytes > 0 else -block


def _peak(trace: MemoryTrace, index: int, block_bytes: Mapping[int, int] | None) -> Peak:
    alive: dict[int, tuple[MemoryEvent, int]] = {}
    for event in trace.events[: index + 1]:
        if event.num_bytes > 0:
            alive[event.storage] = event, _bytes(event, block_bytes)
        else:
            alive.pop(event.storage, None)
    categories: Counter[Category] = Counter()
    modules: Counter[str] = Counter()
    for event, num_bytes in alive.values():
        categories[event.category] += num_bytes
        modules[event.module] += num_bytes
    largest = sorted(alive.values(), key=lambda item: item[1], reverse=True)[:NUM_TOP]
    at = trace.events[index]
    return Peak(
        event=index,
        step=at.step,
        phase=at.phase,
        num_bytes=sum(categories.values()),
        categories={category: categories[category] for category in CATEGORIES},
        modules=tuple(
            Living(name, "", None, num_bytes) for name, num_bytes in modules.most_common(NUM_TOP + 1) if name
        )[:NUM_TOP],
        tensors=tuple(Living(event.module, event.op, event.category, num_bytes) for event, num_bytes in largest),
    )
