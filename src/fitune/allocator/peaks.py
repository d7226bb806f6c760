"""From a trace to the live bytes of each category over time, and what is alive at the peaks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fitune.allocator.replay import number_storages
from fitune.errors import UsageError
from fitune.trace.events import CATEGORIES, Category, EventColumns, MemoryTrace, Phase
from fitune.trace.recording import Integers

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
    """categories: live bytes after each event, int64 [events]; total_bytes is their sum. peak: of the whole trace;
    last_step_peak: of the last step."""

    categories: Mapping[Category, Integers]
    total_bytes: Integers
    peak: Peak
    last_step_peak: Peak


def timeline(trace: MemoryTrace) -> MemoryTimeline:
    """Live bytes over the trace's events, as requested. Raises UsageError for a trace without events."""
    columns = _columns(trace)
    sizes = columns.num_bytes
    total_bytes = np.cumsum(sizes)
    last_step = int(columns.step.max())
    return MemoryTimeline(
        categories={
            category: np.cumsum(np.where(columns.category == number, sizes, 0))
            for number, category in enumerate(CATEGORIES)
        },
        total_bytes=total_bytes,
        peak=_peak(trace, columns, sizes, int(np.argmax(total_bytes))),
        last_step_peak=step_peaks(trace, (last_step,))[last_step],
    )


def step_peaks(
    trace: MemoryTrace, steps: Sequence[int], *, allocated_changes: Integers | None = None
) -> dict[int, Peak]:
    """Of each of these steps. allocated_changes: what the events did in an allocator (`ReplayResult`); without it the
    requested bytes are counted. Raises UsageError for a trace without events."""
    columns = _columns(trace)
    sizes = columns.num_bytes if allocated_changes is None else allocated_changes
    total_bytes = np.cumsum(sizes)
    peaks = {}
    for step in steps:
        inside = np.flatnonzero(columns.step == step)
        peaks[step] = _peak(trace, columns, sizes, int(inside[np.argmax(total_bytes[inside])]))
    return peaks


def _columns(trace: MemoryTrace) -> EventColumns:
    if not trace.events:
        raise UsageError("the trace holds no event: nothing was allocated while it was recorded")
    return trace.columns()


def _peak(trace: MemoryTrace, columns: EventColumns, sizes: Integers, index: int) -> Peak:
    is_birth = columns.num_bytes[: index + 1] > 0
    born = np.flatnonzero(is_birth)
    storage = number_storages(columns.storage[: index + 1])
    is_dead = np.zeros(int(storage.max(initial=0)) + 1, dtype=np.bool_)
    is_dead[storage[~is_birth]] = True
    alive = born[~is_dead[storage[born]]]
    living = sizes[alive]
    names, which = trace.modules(alive)
    of_modules = np.zeros(len(names), dtype=np.int64)
    np.add.at(of_modules, which, living)
    modules: Counter[str] = Counter()
    for module, num_bytes in zip(names, of_modules.tolist(), strict=True):
        modules[module] += num_bytes
    largest = [(trace.events[int(alive[i])], int(living[i])) for i in np.argsort(-living, kind="stable")[:NUM_TOP]]
    at = trace.events[index]
    return Peak(
        event=index,
        step=at.step,
        phase=at.phase,
        num_bytes=int(living.sum()),
        categories={
            category: int(living[columns.category[alive] == number].sum()) for number, category in enumerate(CATEGORIES)
        },
        modules=tuple(
            Living(name, "", None, num_bytes) for name, num_bytes in modules.most_common(NUM_TOP + 1) if name
        )[:NUM_TOP],
        tensors=tuple(Living(event.module, event.op, event.category, num_bytes) for event, num_bytes in largest),
    )
