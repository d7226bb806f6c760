"""Finds what grows outside of a loop when the loop has more iterations.

An example is a list of the gradient norms of all layers. Either a second recording with fewer
iterations shows the growth, or the growth of a similar recording is known and transferred.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fitune.recorder.recording import Integers, Recording
from fitune.trace.loop_iterations import Coordinates, Iterations, find_sections


@dataclass(frozen=True)
class Growth:
    """What one iteration more adds outside of the template iterations."""

    #: the additional bytes of each allocation of the recording
    num_bytes: Integers
    #: the additional sums of work by place (`TraceWork.place`)
    work: Mapping[tuple[object, ...], Integers]


def find_growth(recording: Recording, iterations: Iterations, *, fewer: Recording) -> Growth | None:
    """Return the growth, from a second recording with fewer iterations.

    fewer: the same step recorded with `iterations.num_left_out` iterations less

    Returns None if the two recordings do not have the same structure.
    """
    sections = find_sections(recording, iterations.loop, iterations.num_recorded)
    if sections is None:
        return None
    coordinates = Coordinates.of(recording, sections)
    num_bytes = _growth_of_allocations(recording, coordinates, iterations, fewer)
    work = _growth_of_work(recording, iterations, fewer)
    return None if num_bytes is None or work is None else Growth(num_bytes, work)


def transfer_growth(
    recording: Recording,
    iterations: Iterations,
    *,
    growth: Growth,
    of: Recording,
    of_iterations: Iterations,
) -> Growth | None:
    """Return the growth of a recording with other samples or other recomputation than `of`.

    What grows with the number of layers lies outside of the layers and depends on neither. Returns
    None if something happens there that does not happen in `of`, or if what grows has another size.

    growth: the growth of `of`, whose iterations are `of_iterations`
    """
    if iterations.loop not in recording.loops:
        return None
    of_inner = of.loops.index(of_iterations.loop)
    if np.any(growth.num_bytes[of.loop == of_inner]):
        return None
    kinds, of_kinds = _kinds(recording, iterations.loop), _kinds(of, of_iterations.loop)
    places, of_places = _work_places(recording, iterations), _work_places(of, of_iterations)
    if not {*kinds, None} <= {*of_kinds, None} or not places.keys() <= of_places.keys():
        return None
    # by kind that grows: the size that is expected here, and the growth, of each allocation
    num_more = iterations.num_recorded - of_iterations.num_recorded
    growing = {of_kinds[label] for label in of.label[growth.num_bytes != 0].tolist()}
    expected: dict[_Kind | None, list[tuple[int, int]]] = {kind: [] for kind in growing}
    columns = of.label.tolist(), of.num_bytes.tolist(), growth.num_bytes.tolist()
    for label, num_bytes, more in zip(*columns, strict=True):
        if of_kinds[label] in growing:
            expected[of_kinds[label]].append((num_bytes + more * num_more, more))
    found = np.zeros(len(recording), dtype=np.int64)
    for kind in growing:
        at = np.flatnonzero(np.array([each == kind for each in kinds])[recording.label])
        if len(at) != len(expected[kind]):
            return None
        for num_bytes, (wanted, more) in zip(
            recording.num_bytes[at].tolist(), expected[kind], strict=True
        ):
            if more and num_bytes != wanted:
                return None
        found[at] = [more for _, more in expected[kind]]
    work = {
        place: growth.work[of_places[kind]]
        for kind, place in places.items()
        if of_places[kind] in growth.work
    }
    return Growth(found, work)


#: What allocations outside of the loop have in common, whatever the number of micro-batches.
_Kind = tuple[object, ...]


def _kinds(recording: Recording, loop: str) -> list[_Kind | None]:
    """Return the kind of each label outside of the loop, and None for labels inside.

    Micro-batches are counted from the last one, so that the kinds of steps with more micro-batches
    are comparable.
    """
    last = _last_micro_batches(recording)
    inside = set(recording.label[recording.loop == recording.loops.index(loop)].tolist())
    kinds: list[_Kind | None] = []
    # the category and the place of the free may differ
    for number, (_, where, op, _) in enumerate(recording.labels):
        if number in inside:
            kinds.append(None)
            continue
        from_last = where.micro_batch - last.get((where.phase, where.step), 0)
        kinds.append((where._replace(micro_batch=from_last), op))
    return kinds


def _work_places(recording: Recording, iterations: Iterations) -> dict[_Kind, _Kind]:
    """Return the places of work outside of the loop by their kind, as `_kinds` defines it."""
    last = _last_micro_batches(recording)
    places = {}
    for work in recording.work:
        if work.loop != iterations.loop:
            from_last = work.micro_batch - last.get((work.phase, work.step), 0)
            places[work._replace(micro_batch=from_last).place] = work.place
    return places


def _last_micro_batches(recording: Recording) -> dict[tuple[object, int], int]:
    """Return the last micro-batch of each step: the optimizer follows whichever is the last."""
    last: dict[tuple[object, int], int] = {}
    for work in recording.work:
        if work.phase == "optimizer":
            key = work.phase, work.step
            last[key] = max(last.get(key, 0), work.micro_batch)
    return last


def _growth_of_allocations(
    recording: Recording, coordinates: Coordinates, iterations: Iterations, fewer: Recording
) -> Integers | None:
    """Return the bytes that each allocation grows by with one iteration more.

    This is 0 in the templates; elsewhere, the recording without them shows it.
    """
    less = iterations.num_left_out
    sections = find_sections(fewer, iterations.loop, iterations.num_recorded - less)
    if sections is None or len(sections) != len(coordinates.sections):
        return None
    growth = np.zeros(len(recording), dtype=np.int64)
    for number, (section, other) in enumerate(zip(coordinates.sections, sections, strict=True)):
        if section.is_sweep != other.is_sweep or section.reverse != other.reverse:
            return None
        for iteration in range(len(other.starts)):
            mine = coordinates.slice_of(number, iteration if iteration == 0 else iteration + less)
            its = slice(other.starts[iteration], other.ends[iteration])
            if mine.stop - mine.start != its.stop - its.start:
                return None
            if _labels(recording, mine) != _labels(fewer, its):
                return None
            difference = recording.num_bytes[mine] - fewer.num_bytes[its]
            is_template = section.is_sweep and less == iterations.period and 0 < iteration <= less
            if np.any(difference % less) or (is_template and np.any(difference)):
                return None
            growth[mine] = difference // less
    return growth


def _labels(recording: Recording, span: slice) -> list[tuple[object, ...]]:
    return [recording.labels[label][:3] for label in recording.label[span].tolist()]


def _growth_of_work(
    recording: Recording, iterations: Iterations, fewer: Recording
) -> dict[tuple[object, ...], Integers] | None:
    """Return the sums of work that one iteration more adds in each place outside of the loop."""
    before = {work.place: np.array(work.sums) for work in fewer.work}
    result = {}
    for work in recording.work:
        if work.loop != iterations.loop and work.place in before:
            result[work.place], rest = np.divmod(
                np.array(work.sums) - before[work.place], iterations.num_left_out
            )
            if rest.any():
                return None
    return result
