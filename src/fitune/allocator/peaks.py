"""Compute the live bytes of each category over a trace, and what is live at the peaks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fitune.allocator.replay import number_storages
from fitune.errors import UsageError
from fitune.recorder.events import CATEGORIES, Category, EventColumns, MemoryTrace, Phase
from fitune.recorder.recording import Integers

#: How many modules and tensors a peak lists
NUM_TOP = 10


@dataclass(frozen=True, slots=True)
class Living:
    """A module (`op` is empty) or a tensor that is live at a peak."""

    name: str
    op: str
    category: Category | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The first point of a trace, or of a step, at which the most bytes are live."""

    #: index of the event after which the peak is reached
    event: int
    step: int
    phase: Phase
    num_bytes: int
    #: live bytes of each category; they add up to num_bytes
    categories: Mapping[Category, int]
    #: the largest modules that are live at the peak, largest first
    modules: tuple[Living, ...]
    #: the largest tensors that are live at the peak, largest first
    tensors: tuple[Living, ...]


def highest_peak(trace: MemoryTrace) -> Peak:
    """Return the peak of the live requested bytes over the whole trace.

    Raises UsageError for a trace without events.
    """
    columns = _columns(trace)
    sizes = columns.num_bytes
    return _peak(trace, columns, sizes, int(np.argmax(np.cumsum(sizes))))


def step_peaks(
    trace: MemoryTrace, steps: Sequence[int], *, allocated_changes: Integers | None = None
) -> dict[int, Peak]:
    """Return the peak of each of these steps.

    allocated_changes: by how many bytes each event changed allocated memory in an allocator (see
        `ReplayResult`). Without it the requested bytes are counted.

    Raises UsageError for a trace without events.
    """
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
    is_allocation = columns.num_bytes[: index + 1] > 0
    allocations = np.flatnonzero(is_allocation)
    storage = number_storages(columns.storage[: index + 1])
    is_freed = np.zeros(int(storage.max(initial=0)) + 1, dtype=np.bool_)
    is_freed[storage[~is_allocation]] = True
    live = allocations[~is_freed[storage[allocations]]]
    live_sizes = sizes[live]
    names, which = trace.modules(live)
    module_bytes = np.zeros(len(names), dtype=np.int64)
    np.add.at(module_bytes, which, live_sizes)
    modules: Counter[str] = Counter()
    for module, num_bytes in zip(names, module_bytes.tolist(), strict=True):
        modules[module] += num_bytes
    order = np.argsort(-live_sizes, kind="stable")
    largest = [(trace.events[int(live[i])], int(live_sizes[i])) for i in order[:NUM_TOP]]
    at = trace.events[index]
    return Peak(
        event=index,
        step=at.step,
        phase=at.phase,
        num_bytes=int(live_sizes.sum()),
        categories={
            category: int(live_sizes[columns.category[live] == number].sum())
            for number, category in enumerate(CATEGORIES)
        },
        modules=tuple(
            Living(name, "", None, num_bytes)
            for name, num_bytes in modules.most_common(NUM_TOP + 1)
            if name
        )[:NUM_TOP],
        tensors=tuple(
            Living(event.module, event.op, event.category, num_bytes)
            for event, num_bytes in largest
        ),
    )
