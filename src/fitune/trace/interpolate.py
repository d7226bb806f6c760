"""Computes the recording of a micro-batch from the recordings of two others.

Sizes are affine in the number of samples, so the recordings of two micro-batches determine that of
any other. Both are compared first; where their structure differs, the result is None, and the
caller has to record the whole step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fitune.recorder.cuda_kernels import temporaries_by_shape
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.recording import COLUMNS, Integers, Recording, Rule, TraceWork
from fitune.trace.loop_iterations import NUM_RECORDED_CHUNKS

#: (numerator, denominator): the part of the way from one recording to the other.
_Fraction = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """The numbers that the sizes of a recording depend on."""

    #: the number of samples of each step's micro-batches
    by_step: Mapping[int, int]
    #: the number of tokens of the last chunk of the loss, by loop over its chunks
    last_chunk: Mapping[str, int]


@dataclass(frozen=True)
class SizedRecording:
    """A recording together with the numbers that its sizes depend on."""

    recording: Recording
    sizes: SampleCounts


def interpolate_recordings(
    one: SizedRecording, other: SizedRecording, *, sizes: SampleCounts, target: CudaTarget | None
) -> Recording | None:
    """Return the recording with other sample counts.

    Every size lies on the line through its values in both recordings; kernels' temporaries follow
    the rules of the target instead. Both recordings must have micro-batches of two samples or more,
    since those of one sample may have another structure.

    Returns None if the structure differs, if a rule does not hold, or if a line gives no whole
    number.
    """
    a, b = one.recording, other.recording
    if not have_same_structure(a, b) or not _rules_stay_empty(one, other, sizes, target):
        return None
    fractions = _fractions(*(_size_inputs(a, each) for each in (one.sizes, other.sizes, sizes)))
    num_bytes = _interpolate_integers(a.num_bytes, b.num_bytes, fractions)
    rules: dict[tuple[int, int, _Fraction | None], tuple[Rule, int] | None] = {}
    made: dict[Rule, int] = {}
    rule = np.full(len(a), -1, dtype=np.int64)
    for i in np.flatnonzero(a.rule >= 0).tolist():
        key = int(a.rule[i]), int(b.rule[i]), fractions.at(i)
        if key not in rules:
            rules[key] = _interpolate_rule(a.rules[key[0]], b.rules[key[1]], key[2], target)
        found = rules[key]
        if found is None:
            return None
        rule[i], num_bytes[i] = made.setdefault(found[0], len(made)), found[1]
    work = _interpolate_work(one, other, sizes)
    if work is None or np.any(num_bytes < 0):
        return None
    return replace(a, num_bytes=num_bytes, rule=rule, rules=tuple(made), empty_rules=(), work=work)


def _rules_stay_empty(
    one: SizedRecording, other: SizedRecording, sizes: SampleCounts, target: CudaTarget | None
) -> bool:
    """Return whether kernels without temporaries have none with the wanted sizes either.

    Small tensors have no rule, so the two recordings may differ in how many rules they have. Then
    no rule is broken as long as there are no more samples than in the larger recording.
    """
    a, b = one.recording.empty_rules, other.recording.empty_rules
    if len(a) != len(b):
        return all(
            number <= max(one.sizes.by_step.get(step, 0), other.sizes.by_step.get(step, 0))
            for step, number in sizes.by_step.items()
        )
    for (step, mine), (_, its) in zip(a, b, strict=True):
        counts = (np.array([each.by_step.get(step, 0)]) for each in (one.sizes, other.sizes, sizes))
        if _interpolate_rule(mine, its, _fractions(*counts).at(0), target) is None:
            return False
    return True


def have_same_structure(one: Recording, other: Recording) -> bool:
    """Return whether two recordings are equal except for their sizes.

    Empty rules may differ, since a small tensor has no rule.
    """
    return (
        len(one) == len(other)
        and (one.labels, one.loops) == (other.labels, other.loops)
        and all(
            np.array_equal(getattr(one, name), getattr(other, name)) for name in _STRUCTURE_COLUMNS
        )
    )


def are_equal(one: Recording, other: Recording) -> bool:
    """Return whether two recordings are equal in every allocation and in all work."""
    rules = (
        [each.rules[rule] if rule >= 0 else None for rule in each.rule.tolist()]
        for each in (one, other)
    )
    return (
        have_same_structure(one, other)
        and np.array_equal(one.num_bytes, other.num_bytes)
        and list(next(rules)) == list(next(rules))
        and one.work == other.work
    )


_STRUCTURE_COLUMNS = tuple(name for name in COLUMNS if name not in ("num_bytes", "rule"))


@dataclass(frozen=True, slots=True)
class _Fractions:
    """Fractions of many sizes."""

    numerator: Integers
    #: 0 where both recordings have the same count, which says nothing of another count
    denominator: Integers

    def at(self, number: int) -> _Fraction | None:
        numerator, denominator = int(self.numerator[number]), int(self.denominator[number])
        return (numerator, denominator) if denominator else None


def _fractions(one: Integers, other: Integers, wanted: Integers) -> _Fractions:
    same = one == other
    return _Fractions(wanted - one, np.where(same, wanted == one, other - one))


def _size_inputs(recording: Recording, sizes: SampleCounts) -> Integers:
    """Return the number that the size of each allocation depends on."""
    steps = np.array(
        [sizes.by_step.get(label.where.step, 0) for label in recording.labels], dtype=np.int64
    )
    of_loop = np.array(
        [*(sizes.last_chunk.get(loop, -1) for loop in recording.loops), -1], dtype=np.int64
    )
    of_last = np.where(recording.iteration == NUM_RECORDED_CHUNKS - 1, of_loop[recording.loop], -1)
    return np.where(of_last >= 0, of_last, steps[recording.label])


def _interpolate_integers(one: Integers, other: Integers, fractions: _Fractions) -> Integers:
    """Return for each pair of values the value at its fraction of the way from one to the other.

    It is negative where that is not a whole number.
    """
    numerator, denominator = fractions.numerator, fractions.denominator
    known = (denominator != 0) & ((denominator != 1) | (numerator != 0) | (one == other))
    change, rest = np.divmod((other - one) * numerator, np.where(denominator == 0, 1, denominator))
    return np.where(known & (rest == 0), one + change, -1)


def _interpolate_rule(
    one: Rule, other: Rule, fraction: _Fraction | None, target: CudaTarget | None
) -> tuple[Rule, int] | None:
    """Return the rule for interpolated arguments, and the bytes that it gives.

    Returns None if it gives another number of temporaries.
    """
    if (
        fraction is None
        or target is None
        or (one.op, one.position, one.total) != (other.op, other.position, other.total)
    ):
        return None
    arguments = _interpolate_arguments(one.arguments, other.arguments, fraction)
    if arguments is None:
        return None
    sizes = temporaries_by_shape(target, one.op, arguments)
    if len(sizes) != one.total:
        return None
    return one._replace(arguments=arguments), sizes[one.position] if sizes else 0


def _interpolate_arguments(one: object, other: object, fraction: _Fraction) -> Any:
    """Interpolate the numbers in tuples of any depth.

    Returns None if anything but numbers differs.
    """
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        parts = [
            _interpolate_arguments(*pair, fraction) if pair[0] != pair[1] else pair[0]
            for pair in zip(one, other, strict=True)
        ]
        missing = any(
            part is None and pair is not None for part, pair in zip(parts, one, strict=True)
        )
        return None if missing else tuple(parts)
    if type(one) is int and type(other) is int:
        change, rest = divmod((other - one) * fraction[0], fraction[1])
        return None if rest or one + change < 0 else one + change
    return None


def _interpolate_work(
    one: SizedRecording, other: SizedRecording, sizes: SampleCounts
) -> tuple[TraceWork, ...] | None:
    a, b = one.recording.work, other.recording.work
    if [work.place for work in a] != [work.place for work in b]:
        return None
    last = NUM_RECORDED_CHUNKS - 1

    def size_inputs(sizes: SampleCounts) -> Integers:
        inputs = []
        for work in a:
            of_chunk = sizes.last_chunk.get(work.loop) if work.iteration == last else None
            inputs.append(sizes.by_step.get(work.step, 0) if of_chunk is None else of_chunk)
        return np.array(inputs, dtype=np.int64)

    fractions = _fractions(*(size_inputs(each) for each in (one.sizes, other.sizes, sizes)))
    sums = np.array([work.sums for work in a], dtype=np.int64).reshape(-1, 3).T
    others = np.array([work.sums for work in b], dtype=np.int64).reshape(-1, 3).T
    columns = [
        _interpolate_integers(mine, its, fractions) for mine, its in zip(sums, others, strict=True)
    ]
    if any(np.any(column < 0) for column in columns):
        return None
    return tuple(
        TraceWork(*work.place, *values)
        for work, *values in zip(a, *(c.tolist() for c in columns), strict=True)
    )
