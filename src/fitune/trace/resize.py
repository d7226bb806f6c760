"""Derives a recording for other samples from a recording of one micro-batch, and repeats a step.

What the later micro-batches of the last step do, the first one did before: the same operators of
the same modules on tensors of the same sizes. So an allocation of a later one gets the new size of
that allocation of the first one, in the same place, which had the same old size. What else the
operators of a later micro-batch do concerns gradients and the optimizer's state, whose sizes do not
depend on the samples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fitune.recorder.recording import COLUMNS, NEVER, Integers, Label, Recording, Rule, TraceWork

#: Phase, kind of step, operator, module and iteration of an allocation, or similar for work.
_Place = tuple[object, ...]
#: Bytes and rule of an allocation.
_Size = tuple[int, Rule | None]


def resize(recording: Recording, single: Recording, *, kinds: Sequence[str]) -> Recording | None:
    """Return `recording` with the sizes of `single`.

    recording: its last step is a training step
    single: the same for other samples, with or without the later micro-batches of that step
    kinds: the kinds of all steps

    Returns None if the two do different things, if a later micro-batch has a size that did not
    occur before, or if two allocations had this size and differ now.
    """
    of_step = ("load", *kinds)
    places, allocations = _allocations(recording, of_step)
    their_places, their_allocations = _allocations(single, of_step)
    num_first = _num_in_first_micro_batch(recording, len(kinds))
    same_frees = np.array_equal(_frees(recording, num_first), _frees(single, num_first))
    rest = (single.labels[label].where for label in single.label[num_first:].tolist())
    ends = all(where.phase == "optimizer" or where.micro_batch > 0 for where in rest)
    if places[:num_first] != their_places[:num_first] or not (same_frees and ends):
        return None
    first = their_allocations[:num_first]
    later = _resize_later(recording, places, allocations, first)
    if later is None:
        return None
    sizes = first + later
    empty_rules = _resize_empty_rules(recording, single)
    work = _resize_work(recording, single, of_step)
    if empty_rules is None or work is None:
        return None
    rules: dict[Rule, int] = {}
    return replace(
        recording,
        num_bytes=np.array([num_bytes for num_bytes, _ in sizes], dtype=np.int64),
        rule=np.array(
            [-1 if rule is None else rules.setdefault(rule, len(rules)) for _, rule in sizes],
            dtype=np.int64,
        ),
        rules=tuple(rules),
        empty_rules=empty_rules,
        work=work,
    )


def with_last_step_repeated(recording: Recording, step: int) -> Recording | None:
    """Return the recording with its last step, number `step`, done once more.

    Returns None if the step leaves anything allocated but kernels' workspaces, which are allocated
    once: then a further step is not like it.
    """
    is_earlier = np.array([label.where.step < step for label in recording.labels], dtype=bool)
    start = int(np.count_nonzero(is_earlier[recording.label]))
    of_last = np.arange(start, len(recording))
    is_never_freed = recording.freed_after[of_last] == NEVER
    is_workspace = np.array(
        [label.category == "workspace" for label in recording.labels], dtype=bool
    )
    leaves_tensors = np.any(is_never_freed & ~is_workspace[recording.label[of_last]])
    if leaves_tensors or np.any(recording.freed_after[:start] >= start):
        return None
    source = of_last[~is_never_freed]
    # the number of each allocation when it is repeated
    place = np.cumsum(~is_never_freed) - 1 + len(recording)
    columns: dict[str, Any] = {
        name: np.concatenate((getattr(recording, name), getattr(recording, name)[source]))
        for name in COLUMNS
    }
    # what is freed after a workspace was allocated is freed after the allocation before it
    columns["freed_after"][len(recording) :] = place[recording.freed_after[source] - start]
    labels = {label: number for number, label in enumerate(recording.labels)}
    again = np.zeros(len(labels), dtype=np.int64)
    for number in np.unique(recording.label[source]).tolist():
        again[number] = labels.setdefault(
            _with_step(recording.labels[number], step + 1), len(labels)
        )
    columns["label"][len(recording) :] = again[recording.label[source]]
    return replace(
        recording,
        **columns,
        labels=tuple(labels),
        empty_rules=(
            *recording.empty_rules,
            *((step + 1, rule) for its, rule in recording.empty_rules if its == step),
        ),
        work=(
            *recording.work,
            *(work._replace(step=step + 1) for work in recording.work if work.step == step),
        ),
    )


def _with_step(label: Label, step: int) -> Label:
    freed_at = None if label.freed_at is None else label.freed_at._replace(step=step)
    return label._replace(where=label.where._replace(step=step), freed_at=freed_at)


def _num_in_first_micro_batch(recording: Recording, last_step: int) -> int:
    """Return the number of allocations up to the end of the last step's first micro-batch."""
    is_later = [
        where.step == last_step and where.micro_batch > 0 for _, where, _, _ in recording.labels
    ]
    return int(np.count_nonzero(~np.array(is_later, dtype=bool)[recording.label]))


def _resize_later(
    recording: Recording,
    places: Sequence[_Place],
    allocations: Sequence[_Size],
    first: Sequence[_Size],
) -> list[_Size] | None:
    """Return the new sizes of the allocations after the first micro-batch of the last step.

    first: the new sizes of the allocations before

    Consecutive allocations in one place of a micro-batch are most often equal to those in the same
    place of the first one. None if a size is unknown.
    """
    replaced = _ReplacedSizes(zip(places, allocations, first, strict=False))
    before: dict[_Place, list[int]] = {}
    for number, place in enumerate(places[: len(first)]):
        before.setdefault(place, []).append(number)
    groups: dict[tuple[_Place, int], list[int]] = {}
    for number in range(len(first), len(allocations)):
        where = recording.labels[recording.label[number]].where
        groups.setdefault((places[number], where.micro_batch), []).append(number)
    found: dict[int, _Size | None] = {}
    for (place, _), numbers in groups.items():
        same = before.get(place, [])
        # the sizes of an update do not depend on the samples
        if place[0] == "optimizer":
            found |= {number: allocations[number] for number in numbers}
        elif [allocations[i] for i in numbers] == [allocations[i] for i in same]:
            found |= zip(numbers, (first[number] for number in same), strict=True)
        else:
            found |= {number: replaced.find(place, allocations[number]) for number in numbers}
    sizes = [found[number] for number in range(len(first), len(allocations))]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


class _ReplacedSizes:
    """The new sizes of all old sizes in each place.

    A size that does not occur in its phase, with which a place begins, is looked for in the others.
    """

    def __init__(self, amounts: Iterable[tuple[_Place, object, object]]) -> None:
        self._found: dict[tuple[_Place, object], set[object]] = {}
        for place, old, new in amounts:
            for key in ((place, old), (place[1:], old)):
                self._found.setdefault(key, set()).add(new)

    def find(self, place: _Place, old: object) -> Any:
        """Return the new size, None if the old one did not occur or has several new ones."""
        new = self._found.get((place, old)) or self._found.get((place[1:], old))
        return next(iter(new)) if new is not None and len(new) == 1 else None


def _allocations(recording: Recording, of_step: Sequence[str]) -> tuple[list[_Place], list[_Size]]:
    """Return the place of each allocation, whichever pass of a kind it belongs to, and its size.

    Workspaces have places of their own: kernels allocate them once, and not each time they run.
    """
    labels = [
        (where.phase, of_step[where.step], op, where.module, category == "workspace")
        for category, where, op, _ in recording.labels
    ]
    places = zip(recording.label.tolist(), recording.iteration.tolist(), strict=True)
    sizes = zip(recording.num_bytes.tolist(), recording.rule.tolist(), strict=True)
    return (
        [(*labels[label], iteration) for label, iteration in places],
        [(num_bytes, None if rule < 0 else recording.rules[rule]) for num_bytes, rule in sizes],
    )


def _frees(recording: Recording, num_first: int) -> Integers:
    """Return when the first allocations are freed, not distinguishing what is freed after them."""
    after = recording.freed_after[:num_first]
    return np.where((after == NEVER) | (after >= num_first - 1), num_first, after)


def _resize_empty_rules(
    recording: Recording, single: Recording
) -> tuple[tuple[int, Rule], ...] | None:
    """Return the empty rules of `single` if both have those of the same operators in each step."""
    names, theirs = (
        [(step, rule.op) for step, rule in each.empty_rules] for each in (recording, single)
    )
    return single.empty_rules if names == theirs else None


def _resize_work(
    recording: Recording, single: Recording, of_step: Sequence[str]
) -> tuple[TraceWork, ...] | None:
    """Return the work with the sums of `single`, None if it has no sums for a later micro-batch."""
    last_step = len(of_step) - 1

    def place(work: TraceWork) -> _Place:
        return (work.phase, of_step[work.step], work.op, work.dtype, work.loop, work.iteration)

    def is_update(work: TraceWork) -> bool:
        return work.step == last_step and work.phase == "optimizer"

    def is_first(work: TraceWork) -> bool:
        return not is_update(work) and (work.step < last_step or work.micro_batch == 0)

    first, theirs = list(filter(is_first, recording.work)), list(filter(is_first, single.work))
    if [work.place for work in first] != [work.place for work in theirs]:
        return None
    replaced = _ReplacedSizes(
        (place(old), old.sums, new.sums) for old, new in zip(first, theirs, strict=True)
    )
    change = {
        place(old): tuple(more - less for more, less in zip(new.sums, old.sums, strict=True))
        for old, new in zip(first, theirs, strict=True)
    }
    in_first = iter(theirs)
    result = []
    for work in recording.work:
        if is_update(work):
            result.append(work)
            continue
        if is_first(work):
            result.append(next(in_first))
            continue
        sums = replaced.find(place(work), work.sums)
        if sums is None:
            more = change.get(place(work), (0, 0, 0) if work.op.endswith("_") else None)
            if more is None or work.phase == "forward":
                return None
            sums = tuple(old + new for old, new in zip(work.sums, more, strict=True))
        result.append(TraceWork(*work.place, *sums))
    return tuple(result)
