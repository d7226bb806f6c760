"""Two records of the same steps, held against each other event by event: a prediction and a card's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from fitune.trace.events import MemoryEvent, MemoryTrace


@dataclass(frozen=True, slots=True)
class Moment:
    """A birth, and the deaths between it and the next one, which an allocator cannot tell apart in their order.

    birth: None for the deaths before the first birth. deaths: their bytes, ascending.
    """

    allocation: MemoryEvent | None
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
    """The first moment that differs. index: the number of births before it. Each side: the moment before, the one that
    differs and the one after; None where that side has ended or not begun."""

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
    """Of what happens in the steps: bytes asked for, in order, and the bytes given back between them. What was there
    before step 1 may be in any order. None where there is no difference."""
    sides = tuple(tuple(_moments(trace)) for trace in (predicted, measured))
    for index, (expected, found) in enumerate(zip_longest(*sides)):
        if expected is None or found is None or expected.sizes != found.sizes:
            before, after = _around(sides[0], index), _around(sides[1], index)
            return Difference(max(index - 1, 0), before, after)
    return None


def num_births(trace: MemoryTrace) -> int:
    """In the steps."""
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
