"""A recording for another number of rows, from a short recording of those: of the first pass of each kind alone.

What the later passes do, the first did before: the same operators of the same modules on tensors of the same sizes. So
a birth of a later pass has the new size of the one in its place that had its old size. What the operators of a later
micro-batch do besides is about gradients and the optimizer's state, which know no rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fitune.trace.recording import COLUMNS, NEVER, Integers, Recording, Rule, Work

_Place = tuple[object, ...]
_Size = tuple[int, Rule | None]


def resize(recording: Recording, short: Recording, *, kinds: Sequence[str], num_short: int) -> Recording | None:
    """`recording` with the sizes of `short`, which holds its steps up to number `num_short`, of one micro-batch each,
    for other rows. kinds: of all steps. None where the two do not do the same, or where a later step has a size that
    no earlier one had, or that two had which are equal no longer."""
    of_step = ("load", *kinds)
    places, births = _births(recording, of_step)
    their_places, their_births = _births(short, of_step)
    num_first = _num_births(recording, num_short)
    same_deaths = np.array_equal(_deaths(recording, num_first), _deaths(short, num_first))
    if places[:num_first] != their_places or not same_deaths:
        return None
    later = _later(recording, places, births, their_births)
    if later is None:
        return None
    sizes = their_births + later
    silent, work = _silent(recording, short, num_short), _work(recording, short, of_step, num_short)
    if silent is None or work is None:
        return None
    rules: dict[Rule, int] = {}
    return replace(
        recording,
        num_bytes=np.array([num_bytes for num_bytes, _ in sizes], dtype=np.int64),
        rule=np.array(
            [-1 if rule is None else rules.setdefault(rule, len(rules)) for _, rule in sizes], dtype=np.int64
        ),
        rules=tuple(rules),
        silent=silent,
        work=work,
    )


def first_steps(recording: Recording, number: int) -> Recording:
    """What a recording of the first steps alone would have been."""
    first = _num_births(recording, number)
    columns = {name: getattr(recording, name)[:first] for name in COLUMNS}
    columns["dies_after"] = np.where(columns["dies_after"] < first, columns["dies_after"], NEVER)
    return replace(
        recording,
        **columns,
        silent=tuple(each for each in recording.silent if each[0] <= number),
        work=tuple(work for work in recording.work if work.step <= number),
    )


def _num_births(recording: Recording, step: int) -> int:
    """Up to the end of that step."""
    steps = np.array([label.where.step for label in recording.labels], dtype=np.int64)[recording.label]
    return int(np.count_nonzero(steps <= step))


def _later(
    recording: Recording, places: Sequence[_Place], births: Sequence[_Size], first: Sequence[_Size]
) -> list[_Size] | None:
    """The new sizes of the births behind the first ones, whose new sizes are `first`. What is born in one place of a
    micro-batch, one after the other, is most often what was born there first."""
    grown = _Grown(zip(places, births, first, strict=False))
    before: dict[_Place, list[int]] = {}
    for number, place in enumerate(places[: len(first)]):
        before.setdefault(place, []).append(number)
    groups: dict[tuple[_Place, int, int], list[int]] = {}
    for number in range(len(first), len(births)):
        where = recording.labels[recording.label[number]].where
        groups.setdefault((places[number], where.step, where.micro_batch), []).append(number)
    found: dict[int, _Size | None] = {}
    for (place, _, _), numbers in groups.items():
        same = before.get(place, [])
        if [births[number] for number in numbers] == [births[number] for number in same]:
            found |= zip(numbers, (first[number] for number in same), strict=True)
        else:
            found |= {number: grown.find(place, births[number]) for number in numbers}
    sizes = [found[number] for number in range(len(first), len(births))]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


class _Grown:
    """What became of the old amounts in each place, which begins with phase, kind of pass and operator. The input of a
    later micro-batch is counted to the phase before, so what is not found in its phase is looked for in the others. An
    operator that knew no rows in the optimizer's first step knows none in the next, where there is more state."""

    def __init__(self, amounts: Iterable[tuple[_Place, Any, Any]]) -> None:
        self._found: dict[tuple[_Place, Any], set[Any]] = {}
        self._steady: dict[_Place, bool] = {}  # operators of the optimizer that know no rows
        for place, old, new in amounts:
            for key in ((place, old), (place[1:], old)):
                self._found.setdefault(key, set()).add(new)
            operator = place[:3]
            self._steady[operator] = old == new and self._steady.get(operator, place[0] == "optimizer")

    def find(self, place: _Place, old: Any) -> Any:
        """None where there was no such amount, or several that are equal no longer."""
        new = self._found.get((place, old)) or self._found.get((place[1:], old))
        if new is None:
            return old if self._steady.get(place[:3]) else None
        return next(iter(new)) if len(new) == 1 else None


def _births(recording: Recording, of_step: Sequence[str]) -> tuple[list[_Place], list[_Size]]:
    """What is born where, whichever pass of a kind it is; and how large. A kernel's workspace comes once for all, so it
    is no part of what its operator does each time."""
    labels = [
        (where.phase, of_step[where.step], op, where.module, category == "workspace")
        for category, where, op, _ in recording.labels
    ]
    places = zip(recording.label.tolist(), recording.turn.tolist(), strict=True)
    sizes = zip(recording.num_bytes.tolist(), recording.rule.tolist(), strict=True)
    return (
        [(*labels[label], turn) for label, turn in places],
        [(num_bytes, None if rule < 0 else recording.rules[rule]) for num_bytes, rule in sizes],
    )


def _deaths(recording: Recording, num_first: int) -> Integers:
    """Of the first births; all later than these alike."""
    after = recording.dies_after[:num_first]
    return np.where((after == NEVER) | (after >= num_first - 1), num_first, after)


def _silent(recording: Recording, short: Recording, num_short: int) -> tuple[tuple[int, Rule], ...] | None:
    first = [(step, rule) for step, rule in recording.silent if step <= num_short]
    if [step for step, _ in first] != [step for step, _ in short.silent]:
        return None
    grown = _Grown((("",), old, rule) for (_, old), (_, rule) in zip(first, short.silent, strict=True))
    later = [(step, grown.find(("",), rule)) for step, rule in recording.silent if step > num_short]
    return None if any(rule is None for _, rule in later) else (*short.silent, *later)


def _work(recording: Recording, short: Recording, of_step: Sequence[str], num_short: int) -> tuple[Work, ...] | None:
    def place(work: Work) -> _Place:
        return (work.phase, of_step[work.step], work.op, work.dtype, work.loop, work.turn)

    first = [work for work in recording.work if work.step <= num_short]
    if [work.place for work in first] != [work.place for work in short.work]:
        return None
    grown = _Grown((place(old), old.sums, new.sums) for old, new in zip(first, short.work, strict=True))
    change = {
        place(old): tuple(more - less for more, less in zip(new.sums, old.sums, strict=True))
        for old, new in zip(first, short.work, strict=True)
    }
    result = list(short.work)
    for work in recording.work[len(first) :]:
        sums = grown.find(place(work), work.sums)
        if sums is None:
            more = change.get(place(work), (0, 0, 0) if work.op.endswith("_") else None)
            if more is None or work.phase == "forward" or (work.phase == "optimizer" and any(more)):
                return None
            sums = tuple(old + new for old, new in zip(work.sums, more, strict=True))
        result.append(Work(*work.place, *sums))
    return tuple(result)
