"""Replay a trace in the caching allocator to find the peak of reserved memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from fitune.allocator.fast import IS_COMPILED, is_plain, replay_plain
from fitune.allocator.rules import CachingAllocator, OutOfDeviceMemoryError
from fitune.recorder.events import EventColumns, MemoryTrace
from fitune.recorder.recording import Integers


@dataclass(frozen=True)
class ReplaySettings:
    """The card and the allocator's settings for a replay."""

    #: the value of PYTORCH_ALLOC_CONF
    allocator: str = ""
    #: the card's memory; None for no limit
    total_bytes: int | None = None
    #: memory of the CUDA context and of other processes
    used_by_others_bytes: int = 0
    #: as in torch.cuda.set_per_process_memory_fraction
    memory_fraction: float | None = None
    #: size of a block that is allocated and freed before the first event, as transformers' loader
    #: does with one block of the model's size
    warm_up_bytes: int = 0
    #: whether the replay goes on after a failed allocation, as if the caller had caught the error
    on_oom: Literal["stop", "continue"] = "stop"
    #: the last step to replay; None for all steps
    until_step: int | None = None


@dataclass(frozen=True)
class FailedAllocation:
    """An allocation that failed, with the allocator's state after it."""

    #: index in the trace; None for the warm-up block
    event: int | None
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class ReplayResult:
    """The peaks of a replay, defined as torch.cuda.max_memory_allocated and max_memory_reserved."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    num_ooms: int
    #: index of the first event at which allocated memory is highest; None if none was allocated
    peak_event: int | None
    first_oom: FailedAllocation | None
    #: by how many bytes each replayed event changed allocated memory
    allocated_changes: Integers = field(compare=False)
    #: step -> (allocated, reserved) peaks in bytes, reset when the step begins
    step_peaks: Mapping[int, tuple[int, int]]
    #: step -> num_alloc_retries at its end
    step_retries: Mapping[int, int]


def replay(trace: MemoryTrace, settings: ReplaySettings) -> ReplayResult:
    """Replay the trace in the allocator.

    Raises UsageError for allocator settings that cannot be used.
    """
    allocator = CachingAllocator(
        settings.allocator,
        total_bytes=settings.total_bytes,
        used_by_others_bytes=settings.used_by_others_bytes,
        memory_fraction=settings.memory_fraction,
    )
    columns = trace.columns()
    if (
        IS_COMPILED
        and settings.on_oom == "stop"
        and is_plain(allocator.config)
        and _is_simple(columns)
    ):
        return _replay_plain(columns, settings, allocator)
    return _replay_by_all_rules(columns, settings, allocator)


def _is_simple(columns: EventColumns) -> bool:
    """Return whether all events are on one stream and no storage is allocated twice."""
    allocated = number_storages(columns.storage)[columns.num_bytes > 0]
    is_one_stream = not columns.stream.any()
    return is_one_stream and len(allocated) > 0 and int(np.bincount(allocated).max()) == 1


def number_storages(storage: Integers) -> Integers:
    """Renumber the storages from 0.

    Arrays that are indexed by the new numbers have at most about twice as many elements as the
    trace has events.
    """
    lowest, highest = int(storage.min(initial=0)), int(storage.max(initial=0))
    if lowest >= 0 and highest <= 2 * len(storage):
        return storage
    numbers: Integers = np.unique(storage, return_inverse=True)[1]
    return numbers


def _replay_by_all_rules(
    columns: EventColumns, settings: ReplaySettings, allocator: CachingAllocator
) -> ReplayResult:
    addresses: dict[int, int] = {}
    #: allocated bytes after each event
    allocated: list[int] = []
    failures: list[FailedAllocation] = []
    step_peaks: dict[int, tuple[int, int]] = {}
    step_retries: dict[int, int] = {}
    current_step = 0

    def allocate(event: int | None, num_bytes: int, stream: int = 0) -> int:
        try:
            return allocator.allocate(num_bytes, stream)
        except OutOfDeviceMemoryError as error:
            failures.append(
                FailedAllocation(
                    event, num_bytes, error.allocated_bytes, error.reserved_bytes, error.free_bytes
                )
            )
            return 0

    def end_step() -> None:
        step_peaks[current_step] = allocator.peak_allocated_bytes, allocator.peak_reserved_bytes
        step_retries[current_step] = allocator.num_alloc_retries
        allocator.reset_peaks()

    allocator.free(allocate(None, settings.warm_up_bytes))
    numbers = (
        column.tolist()
        for column in (columns.storage, columns.num_bytes, columns.step, columns.stream)
    )
    for i, (storage, num_bytes, step, stream) in enumerate(zip(*numbers, strict=True)):
        if failures and settings.on_oom == "stop":
            break
        if settings.until_step is not None and step > settings.until_step:
            break
        if step != current_step:
            end_step()
            current_step = step
        if num_bytes > 0:
            addresses[storage] = allocate(i, num_bytes, stream)
        elif num_bytes < 0:
            allocator.free(addresses.pop(storage, 0))
        else:
            allocator.empty_cache()
        allocated.append(allocator.allocated_bytes)
    end_step()
    totals: Integers = np.array([0, *allocated], dtype=np.int64)
    return ReplayResult(
        peak_allocated_bytes=max(allocated for allocated, _ in step_peaks.values()),
        peak_reserved_bytes=max(reserved for _, reserved in step_peaks.values()),
        num_alloc_retries=allocator.num_alloc_retries,
        num_ooms=allocator.num_ooms,
        peak_event=int(np.argmax(allocated)) if any(allocated) else None,
        first_oom=failures[0] if failures else None,
        allocated_changes=totals[1:] - totals[:-1],
        step_peaks=step_peaks,
        step_retries=step_retries,
    )


def _replay_plain(
    columns: EventColumns, settings: ReplaySettings, allocator: CachingAllocator
) -> ReplayResult:
    """Replay in C. `allocator` only provides the memory limits."""
    limits = [limit for limit in (allocator.limit_bytes, allocator.free_bytes) if limit is not None]
    num_events = len(columns.step)
    if settings.until_step is not None and columns.step.max() > settings.until_step:
        num_events = int(np.argmax(columns.step > settings.until_step))
    if num_events == 0:
        return _replay_by_all_rules(columns, settings, allocator)
    warm_up = [settings.warm_up_bytes, -settings.warm_up_bytes] if settings.warm_up_bytes else []
    first = len(warm_up)
    storage, requested, step = (
        np.concatenate([np.array(before, dtype=np.int64), column[:num_events]])
        for before, column in (
            ([0] * first, number_storages(columns.storage) + 1),
            (warm_up, columns.num_bytes),
            ([0] * first, columns.step),
        )
    )
    done = replay_plain(storage, requested, limit_bytes=min(limits, default=None))
    allocated, reserved = np.cumsum(done.allocated_changes), done.reserved_bytes
    end = len(reserved)
    step = step[:end]
    cuts = np.flatnonzero(np.diff(step)) + 1
    step_peaks, step_retries = {0: (0, 0)}, {0: 0}
    for begin, stop in pairwise([0, *cuts.tolist(), end]):
        # At the step's beginning the peaks are reset to the values after the event before it.
        since = slice(max(begin - 1, 0), stop)
        peaks = int(allocated[since].max()), int(reserved[since].max())
        step_peaks[int(step[begin])] = peaks
        step_retries[int(step[begin])] = int(np.searchsorted(done.retries_at, stop))
    live = allocated[first:]
    failure = None
    if done.failed_at is not None:
        at, reserved_then = done.failed_at, int(reserved[-1])
        free_bytes = 0
        if allocator.free_bytes is not None:
            free_bytes = max(allocator.free_bytes - reserved_then, 0)
        event = at - first if at >= first else None
        failure = FailedAllocation(
            event, int(requested[at]), int(allocated[at]), reserved_then, free_bytes
        )
    return ReplayResult(
        peak_allocated_bytes=max(peak for peak, _ in step_peaks.values()),
        peak_reserved_bytes=max(peak for _, peak in step_peaks.values()),
        num_alloc_retries=len(done.retries_at),
        num_ooms=int(failure is not None),
        peak_event=int(np.argmax(live)) if len(live) and live.max() > 0 else None,
        first_oom=failure,
        allocated_changes=done.allocated_changes[first:],
        step_peaks=step_peaks,
        step_retries=step_retries,
    )
