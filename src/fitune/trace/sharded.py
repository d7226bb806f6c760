"""Computes what one of N processes allocates, from what a single process would.

This predicts model.shard=full (FSDP2), which is not recorded. Parameters, gradients and optimizer
state become the N-th part of what was recorded. What a process gathers while it computes is added
as one block that stays allocated through the whole trace. This is more than there is at any time,
since the gathered weights of a layer and the sum of its gradients are not always allocated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import numpy.typing as npt

from fitune.recorder.events import CATEGORIES, EventColumns, MemoryEvent, MemoryTrace

#: What is split by rank.
SHARDED_CATEGORIES = ("parameter", "gradient", "optimizer_state")


@dataclass(frozen=True)
class ShardedEvents(Sequence[MemoryEvent]):
    """The events of `whole` with smaller parameters, after the allocation of what is gathered."""

    whole: MemoryTrace
    num_shards: int
    gathered_bytes: int

    def __len__(self) -> int:
        return len(self.whole.events) + 1

    @overload
    def __getitem__(self, index: int) -> MemoryEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[MemoryEvent]: ...
    def __getitem__(self, index: int | slice) -> MemoryEvent | list[MemoryEvent]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number == 0:
            storage = int(self.whole.columns().storage.max(initial=-1)) + 1
            return MemoryEvent(
                storage, self.gathered_bytes, "workspace", "load", module="gathered layers"
            )
        event = self.whole.events[number - 1]
        if event.category not in SHARDED_CATEGORIES:
            return event
        return replace(event, num_bytes=int(_part(np.array(event.num_bytes), self.num_shards)))

    def __iter__(self) -> Iterator[MemoryEvent]:
        return (self[number] for number in range(len(self)))

    def columns(self) -> EventColumns:
        whole = self.whole.columns()
        is_sharded = np.isin(
            whole.category, [CATEGORIES.index(name) for name in SHARDED_CATEGORIES]
        )
        num_bytes = np.where(is_sharded, _part(whole.num_bytes, self.num_shards), whole.num_bytes)
        gathered = self[0]
        first = (
            gathered.storage,
            gathered.num_bytes,
            gathered.step,
            gathered.stream,
            CATEGORIES.index(gathered.category),
        )
        rest = (whole.storage, num_bytes, whole.step, whole.stream, whole.category)
        return EventColumns(
            *(np.concatenate(([one], many)) for one, many in zip(first, rest, strict=True))
        )

    def modules(self, indices: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.int64]]:
        names, which = self.whole.modules(indices[indices > 0] - 1)
        found = np.full(len(indices), len(names))
        found[indices > 0] = which
        return [*names, self[0].module], found


def sharded(trace: MemoryTrace, *, num_shards: int, gathered_bytes: int) -> MemoryTrace:
    """Return the trace of one of `num_shards` processes.

    gathered_bytes: the most that a process holds of what belongs to other processes
    """
    events = ShardedEvents(trace, num_shards, gathered_bytes)
    source = (
        f"weights, gradients and optimizer state are the {num_shards}th part of one card's",
        "what is gathered is counted through the whole step, which is more than there ever is; "
        "it has not been measured on cards",
    )
    return MemoryTrace(events, (*trace.source, *source))


def _part(num_bytes: npt.NDArray[np.int64], num_shards: int) -> npt.NDArray[np.int64]:
    """Return the bytes of one rank's part of each allocation or free.

    Rows that do not divide evenly are padded.
    """
    part: npt.NDArray[np.int64] = np.sign(num_bytes) * -(-np.abs(num_bytes) // num_shards)
    return part
