"""From recordings of a short loop or of two micro-batches to that of a long loop or another micro-batch.

A model of 80 equal layers does 80 times the same, so a few layers are recorded and the turns in the middle are
repeated (`repeat_turns`). Sizes are affine in the number of rows, so two micro-batches give any other
(`interpolate_rows`). Both compare the structure first and answer None where it is not as expected: then the
caller records the whole.

    template of period p, r turns left over:   0 | 1 .. p | p+1 .. 2p | 2p+1 .. 2p+r | last
    repeated to n turns:                       0 | 1 .. p | p+1 .. 2p | again ...    | 2p+1 .. 2p+r | last

The two middles must be equal, down to which birth of which turn dies when, seen from the turn. Whether a tensor dies in
the next turn or in the last one can only be told with both, which is why two are recorded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fitune.trace.cuda_kernels import temporaries_by_shape
from fitune.trace.cuda_target import CudaTarget
from fitune.trace.recording import COLUMNS, NEVER, Integers, Recording, Rule, TraceWork

NUM_RECORDED_CHUNKS = 4
"""Of a loss, where its middle ones are skipped: the first, two middles and the last."""
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Iterations:
    """A loop as it was recorded: its name, the period of equal turns, how many turns were recorded and how many there
    are in all. The recorded ones are the first, twice `period`, those left over and the last. num_kinds_within: so many
    of the first turns hold one of each kind."""

    loop: str
    period: int
    num_recorded: int
    num_turns: int
    num_kinds_within: int = 0

    @property
    def num_left_out(self) -> int:
        """By how many turns the recording is larger that tells what a turn more adds: by both middles, or by one where
        the rest would lack a kind and all that is made for it."""
        both = 2 * self.period
        return both if self.num_recorded - both >= self.num_kinds_within else self.period

    def template(self, turn: int) -> int:
        """The recorded turn that turn number `turn` is equal to."""
        if turn <= self.period:
            return turn
        from_end = self.num_turns - turn
        if from_end <= self.num_recorded - self.period - 1:
            return self.num_recorded - from_end
        return 1 + (turn - 1) % self.period


def num_recorded_turns(num_turns: int, period: int) -> int:
    """How many turns a recording needs, to be repeated to `num_turns`."""
    return 2 * period + 2 + (num_turns - 2) % period


@dataclass(frozen=True)
class _Section:
    """Consecutive births: outside of the loop (starts of length 2: begin, end), or one sweep over all turns in their
    order (or reverse), turn i from starts[i] to ends[i]."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    is_sweep: bool
    reverse: bool = False


@dataclass(frozen=True)
class Growth:
    """What a turn more adds outside of the middles, e.g. to a list of all gradient norms: bytes of each birth, and sums
    of work by place."""

    num_bytes: Integers
    work: Mapping[tuple[object, ...], Integers]


def find_growth(recording: Recording, turns: Iterations, *, fewer: Recording) -> Growth | None:
    """fewer: the same recorded with `turns.num_left_out` turns less. None where it is not the same."""
    sections = _sections(recording, turns.loop, turns.num_recorded)
    if sections is None:
        return None
    places = _Places.of(recording, sections)
    num_bytes = _growth_of_births(recording, places, turns, fewer)
    work = _growth_of_work(recording, turns, fewer)
    return None if num_bytes is None or work is None else Growth(num_bytes, work)


def transfer_growth(
    recording: Recording, turns: Iterations, *, growth: Growth, of: Recording, of_turns: Iterations
) -> Growth | None:
    """The growth of a recording with other rows or recomputing, from that of `of`: what grows with the layers lies
    outside of them and sees neither. None where something happens there that does not happen in `of`, or what grows is
    of another size."""
    if turns.loop not in recording.loops or np.any(growth.num_bytes[of.loop == of.loops.index(of_turns.loop)]):
        return None
    theirs, mine = _kinds(of, of_turns.loop), _kinds(recording, turns.loop)
    more_turns = turns.num_recorded - of_turns.num_recorded
    growing = {theirs[label] for label in of.label[growth.num_bytes != 0].tolist()}
    sizes: dict[_Kind | None, list[tuple[int, int]]] = {kind: [] for kind in growing}
    for label, num_bytes, more in zip(of.label.tolist(), of.num_bytes.tolist(), growth.num_bytes.tolist(), strict=True):
        if theirs[label] in growing:
            sizes[theirs[label]].append((num_bytes + more * more_turns, more))
    places, by_place = _places_of_work(of, of_turns), _places_of_work(recording, turns)
    if not {*mine, None} <= {*theirs, None} or not by_place.keys() <= places.keys():
        return None
    found = np.zeros(len(recording), dtype=np.int64)
    for kind in growing:
        at = np.flatnonzero(np.array([each == kind for each in mine])[recording.label])
        if len(at) != len(sizes[kind]) or any(
            more and num_bytes != mine
            for mine, (num_bytes, more) in zip(recording.num_bytes[at].tolist(), sizes[kind], strict=True)
        ):
            return None
        found[at] = [more for _, more in sizes[kind]]
    works = {mine: growth.work[places[kind]] for kind, mine in by_place.items() if places[kind] in growth.work}
    return Growth(found, works)


_Kind = tuple[object, ...]


def _kinds(recording: Recording, loop: str) -> list[_Kind | None]:
    """Of each label outside of the loop what it has in common with that of a step of more micro-batches; None for those
    inside."""
    last = _last_micro_batches(recording)
    inside = set(recording.label[recording.loop == recording.loops.index(loop)].tolist())
    return [
        None
        if number in inside
        else (where._replace(micro_batch=where.micro_batch - last.get((where.phase, where.step), 0)), op)
        for number, (_, where, op, _) in enumerate(recording.labels)  # what is kept for whom is no matter here
    ]


def _places_of_work(recording: Recording, turns: Iterations) -> dict[_Kind, _Kind]:
    """The places outside of the loop, by what they have in common in the same way."""
    last = _last_micro_batches(recording)
    return {
        work._replace(micro_batch=work.micro_batch - last.get((work.phase, work.step), 0)).place: work.place
        for work in recording.work
        if work.loop != turns.loop
    }


def _last_micro_batches(recording: Recording) -> dict[tuple[object, int], int]:
    """Of each step: the optimizer follows whichever is the last."""
    last: dict[tuple[object, int], int] = {}
    for work in recording.work:
        if work.phase == "optimizer":
            key = work.phase, work.step
            last[key] = max(last.get(key, 0), work.micro_batch)
    return last


def repeat_turns(recording: Recording, turns: Iterations, *, growth: Growth | None = None) -> Recording | None:
    """The recording with `num_turns` turns of the loop instead of `num_recorded`; None where they are not equal."""
    found = repeat_inner_turns(recording, turns, growth=growth)
    return None if found is None else found[0]


def repeat_inner_turns(
    recording: Recording, turns: Iterations, *, growth: Growth | None = None, outer: Growth | None = None
) -> tuple[Recording, Growth | None] | None:
    """As `repeat_turns`; and `outer`, what grows with another loop, for what comes of it."""
    if turns.loop not in recording.loops:
        return None
    sections = _sections(recording, turns.loop, turns.num_recorded)
    if sections is None:
        return None
    places = _Places.of(recording, sections)
    seen = _seen_from_turns(recording, places, turns)
    if seen is None:
        return None
    grows = growth or Growth(np.zeros(len(recording), dtype=np.int64), {})
    repeated, source = _repeat(recording, places, turns, growth=grows.num_bytes, seen=seen)
    repeated = replace(repeated, work=_repeat_work(recording, turns, growth=grows.work))
    return repeated, None if outer is None else replace(outer, num_bytes=outer.num_bytes[source])


# ---- finding the turns ----------------------------------------------------------------------------------------------


def _sections(recording: Recording, loop: str, num_turns: int) -> list[_Section] | None:
    """The births cut into sweeps over the loop and what lies between; None where turns come in another order. A birth
    outside of all modules between two turns of one sweep is counted with the turn before it."""
    number = recording.loops.index(loop)
    turn = np.where(recording.loop == number, recording.turn, -1)
    phases: dict[object, int] = {}
    phase_of = [phases.setdefault(label.where[:3], len(phases)) for label in recording.labels]
    phase = np.array(phase_of, dtype=np.int64)[recording.label]
    cuts = np.flatnonzero((np.diff(turn) != 0) | (np.diff(phase) != 0)) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), len(turn)]
    runs = [(int(turn[start]), int(phase[start]), start, end) for start, end in zip(starts, ends, strict=True)]
    sections: list[_Section] = []
    i = 0
    while i < len(runs):
        if runs[i][0] < 0:
            sections.append(_Section((runs[i][2],), (runs[i][3],), is_sweep=False))
            i += 1
            continue
        found = _sweep(runs, i, num_turns)
        if found is None:
            return None
        section, i = found
        sections.append(section)
    return sections


def _sweep(runs: Sequence[tuple[int, int, int, int]], first: int, num_turns: int) -> tuple[_Section, int] | None:
    """The sweep that begins with run number `first`, and the number of the run behind it."""
    step = 1 if runs[first][0] == 0 else -1
    if runs[first][0] != (0 if step > 0 else num_turns - 1):
        return None
    starts, ends = [runs[first][2]], [runs[first][3]]
    current, phase, i = runs[first][0], runs[first][1], first + 1
    while i < len(runs) and runs[i][1] == phase:
        ahead = i + 1 if runs[i][0] < 0 else i
        if ahead >= len(runs) or runs[ahead][1] != phase or runs[ahead][0] not in (current, current + step):
            break
        if runs[ahead][0] == current:
            ends[-1] = runs[ahead][3]
        else:
            ends[-1] = runs[ahead][2]
            starts.append(runs[ahead][2])
            ends.append(runs[ahead][3])
            current += step
        i = ahead + 1
    if len(starts) != num_turns:
        return None
    if step < 0:
        starts, ends = starts[::-1], ends[::-1]
    return _Section(tuple(starts), tuple(ends), is_sweep=True, reverse=step < 0), i


@dataclass(frozen=True)
class _Places:
    """For each birth its section, its turn in it (-1 outside of sweeps) and its place in that turn; and the same for
    the birth that it dies after. section is -1 for what never dies."""

    sections: tuple[_Section, ...]
    section: Integers
    turn: Integers
    offset: Integers
    death_section: Integers
    death_turn: Integers
    death_offset: Integers

    @classmethod
    def of(cls, recording: Recording, sections: Sequence[_Section]) -> "_Places":
        size = len(recording)
        section, turn, offset = (np.full(size, -1, dtype=np.int64) for _ in range(3))
        for number, each in enumerate(sections):
            for index, (start, end) in enumerate(zip(each.starts, each.ends, strict=True)):
                section[start:end] = number
                turn[start:end] = index if each.is_sweep else -1
                offset[start:end] = np.arange(end - start)
        dies = recording.dies_after != NEVER
        at = np.where(dies, recording.dies_after, 0)
        deaths = (np.where(dies, column[at], -1) for column in (section, turn, offset))
        return cls(tuple(sections), section, turn, offset, *deaths)

    def rows(self, section: int, turn: int) -> slice:
        each = self.sections[section]
        return slice(each.starts[turn], each.ends[turn])


# ---- comparing ------------------------------------------------------------------------------------------------------


_EQUAL = ("num_bytes", "loop", "rule", "death_loop")


def _seen_from_turns(recording: Recording, places: _Places, turns: Iterations) -> tuple[Bools, Bools] | None:
    """For each birth whether its death, and the module that runs then, are a matter of how far they are from its turn;
    else of where they are in the whole. None where the middles differ."""
    dies_near = (places.turn >= 0) & (places.death_turn >= 0) & (np.abs(places.death_turn - places.turn) <= 1)
    named_near = (places.turn >= 0) & (recording.death_turn >= 0) & (np.abs(recording.death_turn - places.turn) <= 1)
    this = recording.death_loop == recording.loops.index(turns.loop)
    for number, section in enumerate(places.sections):
        for turn in range(1, turns.period + 1) if section.is_sweep else ():
            one, other = places.rows(number, turn), places.rows(number, turn + turns.period)
            if one.stop - one.start != other.stop - other.start or not all(
                np.array_equal(column[one], column[other])
                for column in (*(getattr(recording, name) for name in _EQUAL), places.death_section)
            ):
                return None
            if not _have_same_labels(recording, places, one, other, is_first=turn == 1):
                return None
            ends = turn == 1, turn == turns.period
            same, near = _compare(
                places.death_turn, places.death_offset, one, other, shift=turns.period, at=turn, ends=ends
            )
            if not np.all(same | near):
                return None
            dies_near[one] = dies_near[other] = ~same
            same, near = _compare(
                recording.death_turn, recording.death_loop, one, other, shift=turns.period, at=turn, ends=ends
            )
            if not np.all(same | (near & this[one])):
                return None
            named_near[one] = named_near[other] = ~same
    return dies_near, named_near & this


def _have_same_labels(recording: Recording, places: _Places, one: slice, other: slice, *, is_first: bool) -> bool:
    """What dies in the first turn may die in another module than what dies in a middle: where the input needs no
    gradient, the first turn's backward comes in another order."""
    unequal = np.flatnonzero(recording.label[one] != recording.label[other])
    if not len(unequal):
        return True
    return is_first and all(
        recording.labels[recording.label[one][index]][:3] == recording.labels[recording.label[other][index]][:3]
        and places.death_turn[one][index] == 0
        for index in unequal.tolist()
    )


def _compare(
    turn: Integers, offset: Integers, one: slice, other: slice, *, shift: int, at: int, ends: tuple[bool, bool]
) -> tuple[Bools, Bools]:
    """Whether what `turn` and `offset` name for the births of one turn is the same for those a period later; and
    whether it is the same seen from the turn. The places in the first turn and in those behind the middles are not
    compared with those in a middle, which may be longer or shorter."""
    distance = turn[one] - at
    equal = offset[one] == offset[other]
    same = (turn[one] == turn[other]) & equal
    unlike = ((distance == -1) & ends[0]) | ((distance == 1) & ends[1])
    near = (turn[one] >= 0) & (turn[other] - turn[one] == shift) & (np.abs(distance) <= 1) & (equal | unlike)
    return same, near


def _growth_of_births(recording: Recording, places: _Places, turns: Iterations, fewer: Recording) -> Integers | None:
    """Bytes that each birth grows by with a turn more: 0 in the middles, as compared with the recording without them
    elsewhere."""
    less = turns.num_left_out
    sections = _sections(fewer, turns.loop, turns.num_recorded - less)
    if sections is None or len(sections) != len(places.sections):
        return None
    growth = np.zeros(len(recording), dtype=np.int64)
    for number, (section, other) in enumerate(zip(places.sections, sections, strict=True)):
        if section.is_sweep != other.is_sweep or section.reverse != other.reverse:
            return None
        for turn in range(len(other.starts)):
            mine = places.rows(number, turn if turn == 0 else turn + less)
            its = slice(other.starts[turn], other.ends[turn])
            if mine.stop - mine.start != its.stop - its.start:
                return None
            if _labels(recording, mine) != _labels(fewer, its):
                return None
            difference = recording.num_bytes[mine] - fewer.num_bytes[its]
            if np.any(difference % less) or (
                section.is_sweep and less == turns.period and 0 < turn <= less and np.any(difference)
            ):
                return None
            growth[mine] = difference // less
    return growth


def _labels(recording: Recording, rows: slice) -> list[tuple[object, ...]]:
    return [recording.labels[label][:3] for label in recording.label[rows].tolist()]


# ---- repeating ------------------------------------------------------------------------------------------------------


def _repeat(
    recording: Recording, places: _Places, turns: Iterations, *, growth: Integers, seen: tuple[Bools, Bools]
) -> tuple[Recording, Integers]:
    """And which birth of `recording` each one was."""
    starts = np.zeros((len(places.sections), turns.num_turns), dtype=np.int64)  # where each turn begins in the result
    sources, new_turns = [], []
    position = 0
    for number, section in enumerate(places.sections):
        order = range(turns.num_turns if section.is_sweep else 1)
        for turn in reversed(order) if section.reverse else order:
            rows = places.rows(number, turns.template(turn) if section.is_sweep else 0)
            starts[number, turn] = position
            sources.append(np.arange(rows.start, rows.stop))
            new_turns.append(np.full(rows.stop - rows.start, turn if section.is_sweep else -1))
            position += rows.stop - rows.start
    source: Integers = np.concatenate(sources)
    new_turn: Integers = np.concatenate(new_turns)
    columns = {name: getattr(recording, name)[source] for name in COLUMNS}
    in_loop = columns["loop"] == recording.loops.index(turns.loop)
    columns["turn"] = np.where(in_loop, new_turn, columns["turn"])
    columns["num_bytes"] = columns["num_bytes"] + growth[source] * (turns.num_turns - turns.num_recorded)
    whose = _second_middle(places, turns, source, new_turn)
    columns["label"] = recording.label[whose]
    columns |= _deaths(recording, places, turns, source=whose, turn=new_turn, starts=starts, seen=seen)
    return replace(recording, **columns), source


def _second_middle(places: _Places, turns: Iterations, source: Integers, turn: Integers) -> Integers:
    """Whose death is looked at. What a repeated first middle ends in the turn before is read off the second middle:
    before that comes a middle too, before the first one does not."""
    own = places.turn[source]
    back = (own >= 1) & (own <= turns.period) & (turn != own) & (places.death_turn[source] == own - 1)
    shift = np.zeros((len(places.sections), turns.num_recorded), dtype=np.int64)
    for number, section in enumerate(places.sections):
        for middle in range(1, turns.period + 1) if section.is_sweep else ():
            shift[number, middle] = section.starts[middle + turns.period] - section.starts[middle]
    return np.where(back, source + shift[places.section[source], own], source)


def _deaths(
    recording: Recording, places: _Places, turns: Iterations, *, source: Integers, turn: Integers, starts: Integers,
    seen: tuple[Bools, Bools],
) -> dict[str, Integers]:  # fmt: skip
    """Near deaths keep their distance from the turn of the birth; far ones are counted from the nearer end."""
    own = places.turn[source]

    def moved(old: Integers, near: Bools) -> Integers:
        from_end = old + turns.num_turns - turns.num_recorded
        far = np.where(old < turns.num_recorded // 2, old, from_end)
        return np.where(old < 0, -1, np.where(near, turn + old - own, far))

    dies_near, named_near = seen
    section, offset = places.death_section[source], places.death_offset[source]
    death_turn = moved(places.death_turn[source], dies_near[source])
    named = recording.death_turn[source]
    in_loop = recording.death_loop[source] == recording.loops.index(turns.loop)
    return {
        "dies_after": np.where(section < 0, NEVER, starts[section, np.maximum(death_turn, 0)] + offset),
        "death_turn": np.where(in_loop, moved(named, named_near[source]), named),
    }


def _growth_of_work(
    recording: Recording, turns: Iterations, fewer: Recording
) -> dict[tuple[object, ...], Integers] | None:
    before = {work.place: np.array(work.sums) for work in fewer.work}
    result = {}
    for work in recording.work:
        if work.loop != turns.loop and work.place in before:
            result[work.place], rest = np.divmod(np.array(work.sums) - before[work.place], turns.num_left_out)
            if rest.any():
                return None
    return result


def _repeat_work(
    recording: Recording, turns: Iterations, *, growth: Mapping[tuple[object, ...], Integers]
) -> tuple[TraceWork, ...]:
    """A middle counts for every turn that repeats it."""
    counts = Counter(turns.template(turn) for turn in range(turns.num_turns))
    result = []
    for work in recording.work:
        if work.loop == turns.loop:
            if (times := counts[work.turn]) != 1:
                work = work._replace(**{name: times * getattr(work, name) for name in TraceWork._fields[-3:]})
        elif (more := growth.get(work.place)) is not None:
            sums = np.array(work.sums) + more * (turns.num_turns - turns.num_recorded)
            work = TraceWork(*work.place, *sums.tolist())
        result.append(work)
    return tuple(result)


# ---- another number of rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """What the sizes of a recording depend on: by step the rows of its micro-batches, by loop over the loss's chunks
    the positions of the last chunk."""

    by_step: Mapping[int, int]
    last_chunk: Mapping[str, int]


@dataclass(frozen=True)
class Sample:
    recording: Recording
    rows: Rows


def interpolate_rows(one: Sample, other: Sample, *, rows: Rows, target: CudaTarget | None) -> Recording | None:
    """The recording with another number of rows: every size lies on the line through those of two samples, and what
    the target's kernels allocate inside follows its own rules. None where that is not so, or a line gives no whole
    number. Both samples have two rows or more: one row may have another structure."""
    a, b = one.recording, other.recording
    if not have_same_structure(a, b) or not _stay_silent(one, other, rows, target):
        return None
    lines = _lines(*(_positions(a, each) for each in (one.rows, other.rows, rows)))
    num_bytes = _on_lines(a.num_bytes, b.num_bytes, lines)
    rules: dict[tuple[int, int, _Line | None], tuple[Rule, int] | None] = {}
    made: dict[Rule, int] = {}
    rule = np.full(len(a), -1, dtype=np.int64)
    for i in np.flatnonzero(a.rule >= 0).tolist():
        key = int(a.rule[i]), int(b.rule[i]), lines.at(i)
        if key not in rules:
            rules[key] = _follow_rule(a.rules[key[0]], b.rules[key[1]], key[2], target)
        found = rules[key]
        if found is None:
            return None
        rule[i], num_bytes[i] = made.setdefault(found[0], len(made)), found[1]
    work = _interpolate_work(one, other, rows)
    if work is None or np.any(num_bytes < 0):
        return None
    return replace(a, num_bytes=num_bytes, rule=rule, rules=tuple(made), silent=(), work=work)


def _stay_silent(one: Sample, other: Sample, rows: Rows, target: CudaTarget | None) -> bool:
    """Whether operators that allocated nothing inside allocate nothing with those rows either. What is small has no
    rule, so that the samples may differ in them: then none is broken by fewer rows than the larger sample has."""
    a, b = one.recording.silent, other.recording.silent
    if len(a) != len(b):
        most = (max(one.rows.by_step.get(step, 0), other.rows.by_step.get(step, 0)) for step in rows.by_step)
        return all(number <= limit for number, limit in zip(rows.by_step.values(), most, strict=True))
    for (step, mine), (_, its) in zip(a, b, strict=True):
        line = _lines(*(np.array([each.by_step.get(step, 0)]) for each in (one.rows, other.rows, rows)))
        if _follow_rule(mine, its, line.at(0), target) is None:
            return False
    return True


def have_same_structure(one: Recording, other: Recording) -> bool:
    """Equal but for the sizes, so that both can be samples of the same. Silent rules may differ: what is small enough
    has none."""
    return (
        len(one) == len(other)
        and (one.labels, one.loops) == (other.labels, other.loops)
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in _STRUCTURE)
    )


def are_equal(one: Recording, other: Recording) -> bool:
    """In every birth and in all work."""
    rules = ([each.rules[rule] if rule >= 0 else None for rule in each.rule.tolist()] for each in (one, other))
    return (
        have_same_structure(one, other)
        and np.array_equal(one.num_bytes, other.num_bytes)
        and list(next(rules)) == list(next(rules))
        and one.work == other.work
    )


_STRUCTURE = tuple(name for name in COLUMNS if name not in ("num_bytes", "rule"))
_Line = tuple[int, int]  # the wanted point lies `first` of `second` parts of the way from one sample to the other


@dataclass(frozen=True, slots=True)
class _Lines:
    """Of many births. second: 0 where two equal samples tell nothing of another point."""

    first: Integers
    second: Integers

    def at(self, number: int) -> _Line | None:
        first, second = int(self.first[number]), int(self.second[number])
        return (first, second) if second else None


def _lines(one: Integers, other: Integers, wanted: Integers) -> _Lines:
    same = one == other
    return _Lines(wanted - one, np.where(same, wanted == one, other - one))


def _positions(recording: Recording, rows: Rows) -> Integers:
    """What the size of each birth depends on."""
    steps = np.array([rows.by_step.get(label.where.step, 0) for label in recording.labels], dtype=np.int64)
    of_loop = np.array([*(rows.last_chunk.get(loop, -1) for loop in recording.loops), -1], dtype=np.int64)
    of_last = np.where(recording.turn == NUM_RECORDED_CHUNKS - 1, of_loop[recording.loop], -1)
    return np.where(of_last >= 0, of_last, steps[recording.label])


def _on_lines(one: Integers, other: Integers, lines: _Lines) -> Integers:
    """Negative where there is no such size."""
    first, second = lines.first, lines.second
    known = (second != 0) & ((second != 1) | (first != 0) | (one == other))
    change, rest = np.divmod((other - one) * first, np.where(second == 0, 1, second))
    return np.where(known & (rest == 0), one + change, -1)


def _follow_rule(one: Rule, other: Rule, line: _Line | None, target: CudaTarget | None) -> tuple[Rule, int] | None:
    """The rule with its arguments on the line, and the bytes that it gives; None where it gives another number of
    temporaries."""
    if line is None or target is None or (one.op, one.position, one.total) != (other.op, other.position, other.total):
        return None
    arguments = _between(one.arguments, other.arguments, line)
    if arguments is None:
        return None
    sizes = temporaries_by_shape(target, one.op, arguments)
    if len(sizes) != one.total:
        return None
    return one._replace(arguments=arguments), sizes[one.position] if sizes else 0


def _between(one: Any, other: Any, line: _Line) -> Any:
    """Numbers on the line, in tuples of any depth; None where something else differs."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        parts = [_between(*pair, line) if pair[0] != pair[1] else pair[0] for pair in zip(one, other, strict=True)]
        missing = any(part is None and pair is not None for part, pair in zip(parts, one, strict=True))
        return None if missing else tuple(parts)
    if type(one) is int and type(other) is int:
        change, rest = divmod((other - one) * line[0], line[1])
        return None if rest or one + change < 0 else one + change
    return None


def _interpolate_work(one: Sample, other: Sample, rows: Rows) -> tuple[TraceWork, ...] | None:
    a, b = one.recording.work, other.recording.work
    if [work.place for work in a] != [work.place for work in b]:
        return None
    last = NUM_RECORDED_CHUNKS - 1

    def positions(rows: Rows) -> Integers:
        of_chunks = (rows.last_chunk.get(work.loop) if work.turn == last else None for work in a)
        points = [rows.by_step.get(work.step, 0) if of is None else of for work, of in zip(a, of_chunks, strict=True)]
        return np.array(points, dtype=np.int64)

    lines = _lines(*(positions(each) for each in (one.rows, other.rows, rows)))
    sums = np.array([work.sums for work in a], dtype=np.int64).reshape(-1, 3).T
    others = np.array([work.sums for work in b], dtype=np.int64).reshape(-1, 3).T
    columns = [_on_lines(mine, its, lines) for mine, its in zip(sums, others, strict=True)]
    if any(np.any(column < 0) for column in columns):
        return None
    return tuple(
        TraceWork(*work.place, *values) for work, *values in zip(a, *(c.tolist() for c in columns), strict=True)
    )
