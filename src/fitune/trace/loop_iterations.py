"""Finds the iterations of a loop in a recording.

A model of 80 equal layers does the same thing 80 times, so only a few layers are recorded, and two
template iterations of the recording are repeated (`repeat_layers`). With period p, where iteration
i equals iteration i + p, and r iterations left over:

    recorded:                  0 | 1 .. p | p+1 .. 2p | 2p+1 .. 2p+r | last
    repeated to n iterations:  0 | 1 .. p | p+1 .. 2p | again ...    | 2p+1 .. 2p+r | last

The two templates are 1 .. p and p+1 .. 2p. They must be equal, down to which allocation of which
iteration is freed when, counted from the own iteration. With one template alone, a storage that is
freed in the next iteration could not be distinguished from one that is freed in the last iteration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fitune.recorder.recording import NEVER, Integers, Recording

#: The chunks of a loss that are recorded if most are left out: the first three and the last.
NUM_RECORDED_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class Iterations:
    """A loop of which only some iterations were recorded.

    These are the first one, two templates of `period` iterations, those left over, and the last
    one.
    """

    #: the dotted path of the loop
    loop: str
    #: iteration i is equal to iteration i + period
    period: int
    num_recorded: int
    #: the number of all iterations, recorded or not
    num_iterations: int
    #: this many of the first iterations contain one of each kind
    num_with_all_kinds: int = 0

    @property
    def num_left_out(self) -> int:
        """How many iterations fewer a second recording has, to show what grows with their number.

        It leaves out both templates. It keeps one if some kind of iteration (such as a layer with
        experts) would otherwise be missing, and with it what the model allocates for that kind.
        """
        both = 2 * self.period
        return both if self.num_recorded - both >= self.num_with_all_kinds else self.period

    def template(self, iteration: int) -> int:
        """Return the recorded iteration that equals number `iteration` of the whole loop."""
        if iteration <= self.period:
            return iteration
        from_end = self.num_iterations - iteration
        if from_end <= self.num_recorded - self.period - 1:
            return self.num_recorded - from_end
        return 1 + (iteration - 1) % self.period


def num_recorded_iterations(num_iterations: int, period: int) -> int:
    """Return how many iterations to record so that they can be repeated to `num_iterations`."""
    return 2 * period + 2 + (num_iterations - 2) % period


@dataclass(frozen=True)
class IterationSection:
    """Consecutive allocations, either outside of the loop or of one sweep over all iterations.

    A sweep runs through the iterations in order, or in reverse order as the backward does.
    """

    #: the first allocation of each iteration; a single one outside of the loop
    starts: tuple[int, ...]
    #: the end of each iteration, in the same way
    ends: tuple[int, ...]
    is_sweep: bool
    reverse: bool = False


@dataclass(frozen=True)
class Coordinates:
    """The section and iteration of each allocation, and of the allocation that its free follows."""

    sections: tuple[IterationSection, ...]
    #: index into `sections`
    section: Integers
    #: -1 outside of sweeps
    iteration: Integers
    #: the number of earlier allocations in the iteration, or in a section outside of the loop
    offset: Integers
    #: -1 for what is never freed; the same holds for the other two
    free_section: Integers
    free_iteration: Integers
    free_offset: Integers

    @classmethod
    def of(cls, recording: Recording, sections: Sequence[IterationSection]) -> "Coordinates":
        size = len(recording)
        section, iteration, offset = (np.full(size, -1, dtype=np.int64) for _ in range(3))
        for number, each in enumerate(sections):
            for index, (start, end) in enumerate(zip(each.starts, each.ends, strict=True)):
                section[start:end] = number
                iteration[start:end] = index if each.is_sweep else -1
                offset[start:end] = np.arange(end - start)
        is_freed = recording.freed_after != NEVER
        at = np.where(is_freed, recording.freed_after, 0)
        frees = (np.where(is_freed, column[at], -1) for column in (section, iteration, offset))
        return cls(tuple(sections), section, iteration, offset, *frees)

    def slice_of(self, section: int, iteration: int) -> slice:
        """Return the allocations of one iteration of a section."""
        each = self.sections[section]
        return slice(each.starts[iteration], each.ends[iteration])


def find_sections(
    recording: Recording, loop: str, num_iterations: int
) -> list[IterationSection] | None:
    """Cut the allocations into sweeps over the loop and what lies between them.

    An allocation outside of all modules between two iterations of a sweep is counted as part of the
    iteration before it. Returns None if iterations follow each other in another order.
    """
    number = recording.loops.index(loop)
    iteration = np.where(recording.loop == number, recording.iteration, -1)
    phases: dict[object, int] = {}
    phase_of = [phases.setdefault(label.where[:3], len(phases)) for label in recording.labels]
    phase = np.array(phase_of, dtype=np.int64)[recording.label]
    cuts = np.flatnonzero((np.diff(iteration) != 0) | (np.diff(phase) != 0)) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), len(iteration)]
    runs = [
        (int(iteration[start]), int(phase[start]), start, end)
        for start, end in zip(starts, ends, strict=True)
    ]
    sections: list[IterationSection] = []
    i = 0
    while i < len(runs):
        if runs[i][0] < 0:
            sections.append(IterationSection((runs[i][2],), (runs[i][3],), is_sweep=False))
            i += 1
            continue
        found = _sweep(runs, i, num_iterations)
        if found is None:
            return None
        section, i = found
        sections.append(section)
    return sections


def _sweep(
    runs: Sequence[tuple[int, int, int, int]], first: int, num_iterations: int
) -> tuple[IterationSection, int] | None:
    """Return the sweep that begins with run number `first`, and the number of the run after it.

    runs: (iteration, phase, start, end) of consecutive allocations that have these in common
    """
    step = 1 if runs[first][0] == 0 else -1
    if runs[first][0] != (0 if step > 0 else num_iterations - 1):
        return None
    starts, ends = [runs[first][2]], [runs[first][3]]
    current, phase, i = runs[first][0], runs[first][1], first + 1
    while i < len(runs) and runs[i][1] == phase:
        ahead = i + 1 if runs[i][0] < 0 else i
        if (
            ahead >= len(runs)
            or runs[ahead][1] != phase
            or runs[ahead][0] not in (current, current + step)
        ):
            break
        if runs[ahead][0] == current:
            ends[-1] = runs[ahead][3]
        else:
            ends[-1] = runs[ahead][2]
            starts.append(runs[ahead][2])
            ends.append(runs[ahead][3])
            current += step
        i = ahead + 1
    if len(starts) != num_iterations:
        return None
    if step < 0:
        starts, ends = starts[::-1], ends[::-1]
    return IterationSection(tuple(starts), tuple(ends), is_sweep=True, reverse=step < 0), i
