"""Compares two traces of the same steps event by event: a prediction and what a card recorded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from fitune.recorder.events import MemoryEvent, MemoryTrace


@dataclass(frozen=True, slots=True)
class Moment:
    """An allocation, and the frees between it and the next allocation.

    The order of these frees makes no difference to an allocator.
    """

    #: None for the frees before the first allocation
    allocation: MemoryEvent | None
    #: their bytes in ascending order
    frees: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, tuple[int, ...]]:
        return (self.allocation.num_bytes if self.allocation else 0), self.frees

    def __str__(self) -> str:
        words = []
        if self.allocation is not None:
            allocation = self.allocation
            named = [f"step {allocation.step} {allocation.phase}", allocation.op, allocation.module]
            words.append(f"+{allocation.num_bytes:,} ({', '.join(word for word in named if word)})")
        words += [f"-{num_bytes:,}" for num_bytes in self.frees]
        return ", ".join(words) or "nothing"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first moment in which two traces differ.

    On each side, these are the moment before, the one that differs and the one after. None stands
    for a moment before the beginning or after the end.
    """

    #: the number of allocations before it
    index: int
    predicted: tuple[Moment | None, Moment | None, Moment | None]
    measured: tuple[Moment | None, Moment | None, Moment | None]

    def __str__(self) -> str:
        lines = [f"the records differ at allocation {self.index:,}:"]
        for name, side in (("predicted", self.predicted), ("measured", self.measured)):
            for mark, moment in zip((" ", ">", " "), side, strict=True):
                lines.append(f"  {name:9} {mark} {moment if moment is not None else '(none)'}")
        return "\n".join(lines)


def first_difference(predicted: MemoryTrace, measured: MemoryTrace) -> Difference | None:
    """Return the first difference in the steps, None if there is none.

    Compared are the requested bytes in order, and the bytes that are freed between them. What was
    allocated before step 1 may be in any order.
    """
    sides = tuple(tuple(_moments(trace)) for trace in (predicted, measured))
    for index, (expected, found) in enumerate(zip_longest(*sides)):
        if expected is None or found is None or expected.sizes != found.sizes:
            before, after = _around(sides[0], index), _around(sides[1], index)
            return Difference(max(index - 1, 0), before, after)
    return None


def num_births(trace: MemoryTrace) -> int:
    """Return the number of allocations in the steps."""
    return sum(event.num_bytes > 0 for event in trace.events if event.step >= 1)


def _moments(trace: MemoryTrace) -> Iterator[Moment]:
    allocation: MemoryEvent | None = None
    frees: list[int] = []
    for event in trace.events:
        if event.step < 1 or event.num_bytes == 0:
            continue
        if event.num_bytes < 0:
            frees.append(-event.num_bytes)
            continue
        yield Moment(allocation, tuple(sorted(frees)))
        allocation, frees = event, []
    yield Moment(allocation, tuple(sorted(frees)))


def _around(
    moments: tuple[Moment, ...], index: int
) -> tuple[Moment | None, Moment | None, Moment | None]:
    def at(position: int) -> Moment | None:
        return moments[position] if 0 <= position < len(moments) else None

    return at(index - 1), at(index), at(index + 1)
