"""From a trace to the live bytes of each category over time, and what is alive at the peaks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fitune.errors import UsageError
from fitune.trace.events import CATEGORIES, Category, EventColumns, MemoryTrace, Phase

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
    """categories: live bytes after each event, int64 [events]; total_bytes is their sum. peak: of the whole trace.
    step_peaks: of each step that was asked for; last_step_peak: of the last one."""

    categories: Mapping[Category, npt.NDArray[np.int64]]
    total_bytes: npt.NDArray[np.int64]
    peak: Peak
    last_step_peak: Peak
    step_peaks: Mapping[int, Peak]


def timeline(
    trace: MemoryTrace, *, block_bytes: Mapping[int, int] | None = None, steps: Sequence[int] = ()
) -> MemoryTimeline:
    """Live bytes over the trace's events. block_bytes: what each storage took in an allocator (`ReplayResult`); without
    it the requested bytes are counted. Raises UsageError for a trace without events."""
    if not trace.events:
        raise UsageError("the trace holds no event: nothing was allocated while it was recorded")
    columns = trace.columns()
    sizes = columns.num_bytes
    if block_bytes is not None:
        block = np.zeros(int(columns.storage.max()) + 1, dtype=np.int64)
        block[list(block_bytes)] = list(block_bytes.values())
        sizes = np.where(sizes > 0, 1, -1) * block[columns.storage]
    categories = {
        category: np.cumsum(np.where(columns.category == number, sizes, 0))
        for number, category in enumerate(CATEGORIES)
    }
    total_bytes = np.cumsum(sizes)
    last_step = int(columns.step.max())

    @cache
    def peak_at(index: int) -> Peak:
        return _peak(trace, columns, sizes, index)

    def peak_of(step: int) -> Peak:
        inside = np.flatnonzero(columns.step == step)
        return peak_at(int(inside[np.argmax(total_bytes[inside])]))

    step_peaks = {step: peak_of(step) for step in {last_step, *steps}}
    return MemoryTimeline(
        categories=categories,
        total_bytes=total_bytes,
        peak=peak_at(int(np.argmax(total_bytes))),
        last_step_peak=step_peaks[last_step],
        step_peaks=step_peaks,
    )


def _peak(trace: MemoryTrace, columns: EventColumns, sizes: npt.NDArray[np.int64], index: int) -> Peak:
    is_birth = columns.num_bytes[: index + 1] > 0
    born = np.flatnonzero(is_birth)
    alive = born[~np.isin(columns.storage[born], columns.storage[: index + 1][~is_birth])]
    living = sizes[alive]
    modules: Counter[str] = Counter()
    for module, num_bytes in zip(trace.modules(alive), living.tolist(), strict=True):
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
