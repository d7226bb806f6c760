"""MODULE"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fitune.trace.recording import NEVER, Integers, Recording

NUM_RECORDED_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class Iterations:
    """A loop as it was recorded: its name, the period of equal turns, how many turns were recorded and how many there
    are in all. The recorded ones are the first, twice `period`, those left over and the last. num_kinds_within: so many
    of the first turns hold one of each kind."""

    loop: str
    period: int
    num_recorded: int
    num_iterations: int
    num_with_all_kinds: int = 0

    @property
    def num_left_out(self) -> int:
        """By how many turns the recording is larger that tells what a turn more adds: by both middles, or by one where
        the rest would lack a kind and all that is made for it."""
        both = 2 * self.period
        return both if self.num_recorded - both >= self.num_with_all_kinds else self.period

    def template(self, iteration: int) -> int:
        """The recorded turn that turn number `turn` is equal to."""
        if iteration <= self.period:
            return iteration
        from_end = self.num_iterations - iteration
        if from_end <= self.num_recorded - self.period - 1:
            return self.num_recorded - from_end
        return 1 + (iteration - 1) % self.period


def num_recorded_iterations(num_iterations: int, period: int) -> int:
    """How many turns a recording needs, to be repeated to `num_turns`."""
    return 2 * period + 2 + (num_iterations - 2) % period


@dataclass(frozen=True)
class Section:
    """Consecutive births: outside of the loop (starts of length 2: begin, end), or one sweep over all turns in their
    order (or reverse), turn i from starts[i] to ends[i]."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    is_sweep: bool
    reverse: bool = False


@dataclass(frozen=True)
class Coordinates:
    """For each birth its section, its turn in it (-1 outside of sweeps) and its place in that turn; and the same for
    the birth that it dies after. section is -1 for what never dies."""

    sections: tuple[Section, ...]
    section: Integers
    iteration: Integers
    offset: Integers
    free_section: Integers
    free_iteration: Integers
    free_offset: Integers

    @classmethod
    def of(cls, recording: Recording, sections: Sequence[Section]) -> "Coordinates":
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
        each = self.sections[section]
        return slice(each.starts[iteration], each.ends[iteration])


def find_sections(recording: Recording, loop: str, num_iterations: int) -> list[Section] | None:
    """The births cut into sweeps over the loop and what lies between; None where turns come in another order. A birth
    outside of all modules between two turns of one sweep is counted with the turn before it."""
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
    sections: list[Section] = []
    i = 0
    while i < len(runs):
        if runs[i][0] < 0:
            sections.append(Section((runs[i][2],), (runs[i][3],), is_sweep=False))
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
) -> tuple[Section, int] | None:
    """The sweep that begins with run number `first`, and the number of the run behind it."""
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
    return Section(tuple(starts), tuple(ends), is_sweep=True, reverse=step < 0), i
