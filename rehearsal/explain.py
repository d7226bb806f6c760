"""Why a prediction is off: which tensors one side has at its peak and the other has not, which allocations only one of
them makes, and where their orders part."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fitune.allocator.rules import MIN_BLOCK_BYTES
from fitune.recorder.events import MemoryEvent, MemoryTrace
from rehearsal.difference import first_difference, num_births

MOST_LINES = 6
"""Sizes that are named of each kind of difference."""


def explain(predicted: Sequence[MemoryEvent], measured: Sequence[MemoryEvent]) -> list[str]:
    """Both sides have their last step compared. Empty where they are equal, event by event."""
    sides = _only_last(predicted), _only_last(measured)
    difference = first_difference(*(MemoryTrace(tuple(side)) for side in sides))
    if difference is None:
        return []
    (expected, expected_at), (found, found_at) = map(_alive_at_peak, sides)
    alive = [
        *_one_sided("alive at the peak only as predicted", expected, found),
        *_one_sided("alive at the peak only as measured", found, expected),
    ]
    return [
        f"peak predicted at {_place(expected_at)}, measured at {_place(found_at)}",
        *(
            alive
            or [
                "alive at the peak are the same tensors: what differs is what was not split off their blocks"
            ]
        ),
        *_one_sided(
            "allocated in the step only as predicted", _births(sides[0]), _births(sides[1])
        ),
        *_one_sided("allocated in the step only as measured", _births(sides[1]), _births(sides[0])),
        f"{difference.index:,} of {num_births(MemoryTrace(tuple(sides[0]))):,} allocations are equal before the first "
        f"that is not: predicted {difference.predicted[1] or 'nothing'}; "
        f"measured {difference.measured[1] or 'nothing'}",
    ]


def _only_last(events: Sequence[MemoryEvent]) -> list[MemoryEvent]:
    """The last step is step 1, and what lives when it begins was born in step 0."""
    last = max(event.step for event in events)
    alive: dict[int, MemoryEvent] = {}
    inside: list[MemoryEvent] = []
    for event in events:
        if event.step == last:
            inside.append(replace(event, step=1))
        elif event.num_bytes > 0:
            alive[event.storage] = replace(event, step=0)
        else:
            alive.pop(event.storage, None)
    return [*alive.values(), *inside]


def _alive_at_peak(events: Iterable[MemoryEvent]) -> tuple[list[MemoryEvent], MemoryEvent | None]:
    """In blocks, as the allocator counts. The event that makes the peak is the second."""
    alive: dict[int, MemoryEvent] = {}
    total, most = 0, -1
    at_peak: list[MemoryEvent] = []
    peak: MemoryEvent | None = None
    for event in events:
        if event.num_bytes > 0:
            alive[event.storage] = event
            total += _block(event)
            if event.step and total > most:
                most, at_peak, peak = total, list(alive.values()), event
        elif (born := alive.pop(event.storage, None)) is not None:
            total -= _block(born)
    return at_peak, peak


def _block(event: MemoryEvent) -> int:
    return -(-event.num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def _births(events: Iterable[MemoryEvent]) -> list[MemoryEvent]:
    return [event for event in events if event.step and event.num_bytes > 0]


def _one_sided(what: str, here: Sequence[MemoryEvent], there: Sequence[MemoryEvent]) -> list[str]:
    sizes = Counter(event.num_bytes for event in here)
    sizes.subtract(event.num_bytes for event in there)
    surplus = sorted(
        ((size, number) for size, number in sizes.items() if number > 0), key=lambda x: -x[0] * x[1]
    )
    lines = []
    for size, number in surplus[:MOST_LINES]:
        places = Counter(_place(event) for event in here if event.num_bytes == size)
        named = "; ".join(f"{place} ({times})" for place, times in places.most_common(2))
        lines.append(f"{what}: {number} x {size:,}, among {named}")
    return lines


def _place(event: MemoryEvent | None) -> str:
    return (
        "nothing"
        if event is None
        else " ".join(word for word in (event.phase, event.op, event.module) if word)
    )
