"""MODULE"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fitune.trace.loop_iterations import Coordinates, Iterations, find_sections
from fitune.trace.recording import Integers, Recording


@dataclass(frozen=True)
class Growth:
    """What a turn more adds outside of the middles, e.g. to a list of all gradient norms: bytes of each birth, and sums
    of work by place."""

    num_bytes: Integers
    work: Mapping[tuple[object, ...], Integers]


def find_growth(recording: Recording, iterations: Iterations, *, fewer: Recording) -> Growth | None:
    """fewer: the same recorded with `turns.num_left_out` turns less. None where it is not the same."""
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
    """The growth of a recording with other rows or recomputing, from that of `of`: what grows with the layers lies
    outside of them and sees neither. None where something happens there that does not happen in `of`, or what grows is
    of another size."""
    if iterations.loop not in recording.loops or np.any(
        growth.num_bytes[of.loop == of.loops.index(of_iterations.loop)]
    ):
        return None
    their_kinds, mine = _kinds(of, of_iterations.loop), _kinds(recording, iterations.loop)
    num_more = iterations.num_recorded - of_iterations.num_recorded
    growing = {their_kinds[label] for label in of.label[growth.num_bytes != 0].tolist()}
    sizes: dict[_Kind | None, list[tuple[int, int]]] = {kind: [] for kind in growing}
    for label, num_bytes, more in zip(
        of.label.tolist(), of.num_bytes.tolist(), growth.num_bytes.tolist(), strict=True
    ):
        if their_kinds[label] in growing:
            sizes[their_kinds[label]].append((num_bytes + more * num_more, more))
    places, by_place = _work_places(of, of_iterations), _work_places(recording, iterations)
    if not {*mine, None} <= {*their_kinds, None} or not by_place.keys() <= places.keys():
        return None
    found = np.zeros(len(recording), dtype=np.int64)
    for kind in growing:
        at = np.flatnonzero(np.array([each == kind for each in mine])[recording.label])
        if len(at) != len(sizes[kind]) or any(
            more and num_bytes != mine
            for mine, (num_bytes, more) in zip(
                recording.num_bytes[at].tolist(), sizes[kind], strict=True
            )
        ):
            return None
        found[at] = [more for _, more in sizes[kind]]
    works = {
        mine: growth.work[places[kind]]
        for kind, mine in by_place.items()
        if places[kind] in growth.work
    }
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
        else (
            where._replace(micro_batch=where.micro_batch - last.get((where.phase, where.step), 0)),
            op,
        )
        for number, (_, where, op, _) in enumerate(
            recording.labels
        )  # what is kept for whom is no matter here
    ]


def _work_places(recording: Recording, iterations: Iterations) -> dict[_Kind, _Kind]:
    """The places outside of the loop, by what they have in common in the same way."""
    last = _last_micro_batches(recording)
    return {
        work._replace(
            micro_batch=work.micro_batch - last.get((work.phase, work.step), 0)
        ).place: work.place
        for work in recording.work
        if work.loop != iterations.loop
    }


def _last_micro_batches(recording: Recording) -> dict[tuple[object, int], int]:
    """Of each step: the optimizer follows whichever is the last."""
    last: dict[tuple[object, int], int] = {}
    for work in recording.work:
        if work.phase == "optimizer":
            key = work.phase, work.step
            last[key] = max(last.get(key, 0), work.micro_batch)
    return last


def _growth_of_allocations(
    recording: Recording, coordinates: Coordinates, iterations: Iterations, fewer: Recording
) -> Integers | None:
    """Bytes that each birth grows by with a turn more: 0 in the middles, as compared with the recording without them
    elsewhere."""
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
            if np.any(difference % less) or (
                section.is_sweep
                and less == iterations.period
                and 0 < iteration <= less
                and np.any(difference)
            ):
                return None
            growth[mine] = difference // less
    return growth


def _labels(recording: Recording, span: slice) -> list[tuple[object, ...]]:
    return [recording.labels[label][:3] for label in recording.label[span].tolist()]


def _growth_of_work(
    recording: Recording, iterations: Iterations, fewer: Recording
) -> dict[tuple[object, ...], Integers] | None:
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
