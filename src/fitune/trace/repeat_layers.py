"""MODULE"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fitune.trace.loop_growth import Growth
from fitune.trace.loop_iterations import Coordinates, Iterations, find_sections
from fitune.trace.recording import COLUMNS, NEVER, Integers, Recording, TraceWork

Bools = npt.NDArray[np.bool_]


def repeat_iterations(
    recording: Recording, iterations: Iterations, *, growth: Growth | None = None
) -> Recording | None:
    """The recording with `num_turns` turns of the loop instead of `num_recorded`; None where they are not equal."""
    found = repeat_inner_iterations(recording, iterations, growth=growth)
    return None if found is None else found[0]


def repeat_inner_iterations(
    recording: Recording,
    iterations: Iterations,
    *,
    growth: Growth | None = None,
    outer: Growth | None = None,
) -> tuple[Recording, Growth | None] | None:
    """As `repeat_turns`; and `outer`, what grows with another loop, for what comes of it."""
    if iterations.loop not in recording.loops:
        return None
    sections = find_sections(recording, iterations.loop, iterations.num_recorded)
    if sections is None:
        return None
    coordinates = Coordinates.of(recording, sections)
    is_relative = _relative_frees(recording, coordinates, iterations)
    if is_relative is None:
        return None
    grows = growth or Growth(np.zeros(len(recording), dtype=np.int64), {})
    repeated, source = _repeat(
        recording, coordinates, iterations, growth=grows.num_bytes, is_relative=is_relative
    )
    repeated = replace(repeated, work=_repeat_work(recording, iterations, growth=grows.work))
    return repeated, None if outer is None else replace(outer, num_bytes=outer.num_bytes[source])


_EQUAL_COLUMNS = ("num_bytes", "loop", "rule", "free_loop")


def _relative_frees(
    recording: Recording, coordinates: Coordinates, iterations: Iterations
) -> tuple[Bools, Bools] | None:
    """For each birth whether its death, and the module that runs then, are a matter of how far they are from its turn;
    else of where they are in the whole. None where the middles differ."""
    free_is_near = (
        (coordinates.iteration >= 0)
        & (coordinates.free_iteration >= 0)
        & (np.abs(coordinates.free_iteration - coordinates.iteration) <= 1)
    )
    free_module_is_near = (
        (coordinates.iteration >= 0)
        & (recording.free_iteration >= 0)
        & (np.abs(recording.free_iteration - coordinates.iteration) <= 1)
    )
    this = recording.free_loop == recording.loops.index(iterations.loop)
    for number, section in enumerate(coordinates.sections):
        for iteration in range(1, iterations.period + 1) if section.is_sweep else ():
            one, other = (
                coordinates.slice_of(number, iteration),
                coordinates.slice_of(number, iteration + iterations.period),
            )
            if one.stop - one.start != other.stop - other.start or not all(
                np.array_equal(column[one], column[other])
                for column in (
                    *(getattr(recording, name) for name in _EQUAL_COLUMNS),
                    coordinates.free_section,
                )
            ):
                return None
            if not _have_same_labels(recording, coordinates, one, other, is_first=iteration == 1):
                return None
            ends = iteration == 1, iteration == iterations.period
            same, near = _compare(
                coordinates.free_iteration,
                coordinates.free_offset,
                one,
                other,
                shift=iterations.period,
                at=iteration,
                ends=ends,
            )
            if not np.all(same | near):
                return None
            free_is_near[one] = free_is_near[other] = ~same
            same, near = _compare(
                recording.free_iteration,
                recording.free_loop,
                one,
                other,
                shift=iterations.period,
                at=iteration,
                ends=ends,
            )
            if not np.all(same | (near & this[one])):
                return None
            free_module_is_near[one] = free_module_is_near[other] = ~same
    return free_is_near, free_module_is_near & this


def _have_same_labels(
    recording: Recording, coordinates: Coordinates, one: slice, other: slice, *, is_first: bool
) -> bool:
    """What dies in the first turn may die in another module than what dies in a middle: where the input needs no
    gradient, the first turn's backward comes in another order."""
    unequal = np.flatnonzero(recording.label[one] != recording.label[other])
    if not len(unequal):
        return True
    return is_first and all(
        recording.labels[recording.label[one][index]][:3]
        == recording.labels[recording.label[other][index]][:3]
        and coordinates.free_iteration[one][index] == 0
        for index in unequal.tolist()
    )


def _compare(
    iteration: Integers,
    offset: Integers,
    one: slice,
    other: slice,
    *,
    shift: int,
    at: int,
    ends: tuple[bool, bool],
) -> tuple[Bools, Bools]:
    """Whether what `turn` and `offset` name for the births of one turn is the same for those a period later; and
    whether it is the same seen from the turn. The places in the first turn and in those behind the middles are not
    compared with those in a middle, which may be longer or shorter."""
    distance = iteration[one] - at
    equal = offset[one] == offset[other]
    same = (iteration[one] == iteration[other]) & equal
    unlike = ((distance == -1) & ends[0]) | ((distance == 1) & ends[1])
    near = (
        (iteration[one] >= 0)
        & (iteration[other] - iteration[one] == shift)
        & (np.abs(distance) <= 1)
        & (equal | unlike)
    )
    return same, near


def _repeat(
    recording: Recording,
    coordinates: Coordinates,
    iterations: Iterations,
    *,
    growth: Integers,
    is_relative: tuple[Bools, Bools],
) -> tuple[Recording, Integers]:
    """And which birth of `recording` each one was."""
    starts = np.zeros(
        (len(coordinates.sections), iterations.num_iterations), dtype=np.int64
    )  # where each turn begins in the result
    sources, new_iterations = [], []
    position = 0
    for number, section in enumerate(coordinates.sections):
        order = range(iterations.num_iterations if section.is_sweep else 1)
        for iteration in reversed(order) if section.reverse else order:
            span = coordinates.slice_of(
                number, iterations.template(iteration) if section.is_sweep else 0
            )
            starts[number, iteration] = position
            sources.append(np.arange(span.start, span.stop))
            new_iterations.append(
                np.full(span.stop - span.start, iteration if section.is_sweep else -1)
            )
            position += span.stop - span.start
    source: Integers = np.concatenate(sources)
    new_iteration: Integers = np.concatenate(new_iterations)
    columns = {name: getattr(recording, name)[source] for name in COLUMNS}
    in_loop = columns["loop"] == recording.loops.index(iterations.loop)
    columns["iteration"] = np.where(in_loop, new_iteration, columns["iteration"])
    columns["num_bytes"] = columns["num_bytes"] + growth[source] * (
        iterations.num_iterations - iterations.num_recorded
    )
    whose = _source_of_free(coordinates, iterations, source, new_iteration)
    columns["label"] = recording.label[whose]
    columns |= _repeat_frees(
        recording,
        coordinates,
        iterations,
        source=whose,
        iteration=new_iteration,
        starts=starts,
        is_relative=is_relative,
    )
    return replace(recording, **columns), source


def _source_of_free(
    coordinates: Coordinates, iterations: Iterations, source: Integers, iteration: Integers
) -> Integers:
    """Whose death is looked at. What a repeated first middle ends in the turn before is read off the second middle:
    before that comes a middle too, before the first one does not."""
    own = coordinates.iteration[source]
    back = (
        (own >= 1)
        & (own <= iterations.period)
        & (iteration != own)
        & (coordinates.free_iteration[source] == own - 1)
    )
    shift = np.zeros((len(coordinates.sections), iterations.num_recorded), dtype=np.int64)
    for number, section in enumerate(coordinates.sections):
        for template in range(1, iterations.period + 1) if section.is_sweep else ():
            shift[number, template] = (
                section.starts[template + iterations.period] - section.starts[template]
            )
    return np.where(back, source + shift[coordinates.section[source], own], source)


def _repeat_frees(
    recording: Recording,
    coordinates: Coordinates,
    iterations: Iterations,
    *,
    source: Integers,
    iteration: Integers,
    starts: Integers,
    is_relative: tuple[Bools, Bools],
) -> dict[str, Integers]:
    """Near deaths keep their distance from the turn of the birth; far ones are counted from the nearer end."""
    own = coordinates.iteration[source]

    def shifted(old: Integers, near: Bools) -> Integers:
        from_end = old + iterations.num_iterations - iterations.num_recorded
        far = np.where(old < iterations.num_recorded // 2, old, from_end)
        return np.where(old < 0, -1, np.where(near, iteration + old - own, far))

    free_is_near, free_module_is_near = is_relative
    section, offset = coordinates.free_section[source], coordinates.free_offset[source]
    free_iteration = shifted(coordinates.free_iteration[source], free_is_near[source])
    named = recording.free_iteration[source]
    in_loop = recording.free_loop[source] == recording.loops.index(iterations.loop)
    return {
        "freed_after": np.where(
            section < 0, NEVER, starts[section, np.maximum(free_iteration, 0)] + offset
        ),
        "free_iteration": np.where(in_loop, shifted(named, free_module_is_near[source]), named),
    }


def _repeat_work(
    recording: Recording, iterations: Iterations, *, growth: Mapping[tuple[object, ...], Integers]
) -> tuple[TraceWork, ...]:
    """A middle counts for every turn that repeats it."""
    counts = Counter(
        iterations.template(iteration) for iteration in range(iterations.num_iterations)
    )
    result = []
    for work in recording.work:
        if work.loop == iterations.loop:
            if (times := counts[work.iteration]) != 1:
                work = work._replace(
                    **{name: times * getattr(work, name) for name in TraceWork._fields[-3:]}
                )
        elif (more := growth.get(work.place)) is not None:
            sums = np.array(work.sums) + more * (
                iterations.num_iterations - iterations.num_recorded
            )
            work = TraceWork(*work.place, *sums.tolist())
        result.append(work)
    return tuple(result)
