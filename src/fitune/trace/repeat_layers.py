"""Makes the recording of a long loop from that of a short one, by repeating template iterations.

Which iterations are templates, and why two are needed, is described in `loop_iterations`. The two
templates are compared first; where they differ, the result is None, and the caller has to record
the whole loop.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from fitune.recorder.recording import COLUMNS, NEVER, Integers, Recording, TraceWork
from fitune.trace.loop_growth import Growth
from fitune.trace.loop_iterations import Coordinates, Iterations, find_sections

Bools = npt.NDArray[np.bool_]


def repeat_iterations(
    recording: Recording, iterations: Iterations, *, growth: Growth | None = None
) -> Recording | None:
    """Return the recording with all iterations of the loop, None if the templates differ.

    growth: what each iteration more adds elsewhere
    """
    found = repeat_inner_iterations(recording, iterations, growth=growth)
    return None if found is None else found[0]


def repeat_inner_iterations(
    recording: Recording,
    iterations: Iterations,
    *,
    growth: Growth | None = None,
    outer: Growth | None = None,
) -> tuple[Recording, Growth | None] | None:
    """Repeat iterations as `repeat_iterations` does, and carry the growth of another loop along.

    outer: what grows with the other loop, for each allocation of `recording`

    Returns the recording and `outer` for the allocations of that recording.
    """
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


#: Columns that must be equal in both templates.
_EQUAL_COLUMNS = ("num_bytes", "loop", "rule", "free_loop")


def _relative_frees(
    recording: Recording, coordinates: Coordinates, iterations: Iterations
) -> tuple[Bools, Bools] | None:
    """Return for each allocation whether its free is counted from the allocation's own iteration.

    The second array says the same of the module that runs at the free. Otherwise the free is in a
    fixed iteration of the whole loop. Returns None if the templates differ.
    """
    free_is_near = _is_near(coordinates.iteration, coordinates.free_iteration)
    free_module_is_near = _is_near(coordinates.iteration, recording.free_iteration)
    in_this_loop = recording.free_loop == recording.loops.index(iterations.loop)
    columns = [*(getattr(recording, name) for name in _EQUAL_COLUMNS), coordinates.free_section]
    period = iterations.period
    for number, section in enumerate(coordinates.sections):
        for iteration in range(1, period + 1) if section.is_sweep else ():
            one = coordinates.slice_of(number, iteration)
            other = coordinates.slice_of(number, iteration + period)
            if one.stop - one.start != other.stop - other.start:
                return None
            if not all(np.array_equal(column[one], column[other]) for column in columns):
                return None
            if not _have_same_labels(recording, coordinates, one, other, is_first=iteration == 1):
                return None
            compare = partial(_compare, one=one, other=other, period=period, own=iteration)
            same, near = compare(coordinates.free_iteration, coordinates.free_offset)
            if not np.all(same | near):
                return None
            free_is_near[one] = free_is_near[other] = ~same
            same, near = compare(recording.free_iteration, recording.free_loop)
            if not np.all(same | (near & in_this_loop[one])):
                return None
            free_module_is_near[one] = free_module_is_near[other] = ~same
    return free_is_near, free_module_is_near & in_this_loop


def _is_near(iteration: Integers, free_iteration: Integers) -> Bools:
    """Return whether both are known and at most one iteration apart."""
    is_known = (iteration >= 0) & (free_iteration >= 0)
    is_near: Bools = is_known & (np.abs(free_iteration - iteration) <= 1)
    return is_near


def _have_same_labels(
    recording: Recording, coordinates: Coordinates, one: slice, other: slice, *, is_first: bool
) -> bool:
    """Return whether the allocations of two iterations have the same labels.

    What is freed in the first iteration may be freed in another module than what is freed in a
    template: where the input needs no gradient, the first iteration's backward runs in another
    order.
    """
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
    iteration: Integers, offset: Integers, *, one: slice, other: slice, period: int, own: int
) -> tuple[Bools, Bools]:
    """Compare where the allocations of a template are freed with those one period later.

    Returns whether the places are the same, and whether they are the same counted from the own
    iteration. Offsets in the iteration before the templates, and in those after them, are not
    compared with offsets in a template, since these iterations may be longer or shorter.

    iteration, offset: the place of each allocation's free
    one, other: the allocations of iteration number `own`, and of the one a period later
    """
    distance = iteration[one] - own
    equal = offset[one] == offset[other]
    same = (iteration[one] == iteration[other]) & equal
    is_outside = ((distance == -1) & (own == 1)) | ((distance == 1) & (own == period))
    is_shifted = (iteration[one] >= 0) & (iteration[other] - iteration[one] == period)
    near = is_shifted & (np.abs(distance) <= 1) & (equal | is_outside)
    return same, near


def _repeat(
    recording: Recording,
    coordinates: Coordinates,
    iterations: Iterations,
    *,
    growth: Integers,
    is_relative: tuple[Bools, Bools],
) -> tuple[Recording, Integers]:
    """Return the longer recording, and for each of its allocations the one that it repeats."""
    # where each iteration of each section begins in the result
    starts = np.zeros((len(coordinates.sections), iterations.num_iterations), dtype=np.int64)
    num_more = iterations.num_iterations - iterations.num_recorded
    sources, new_iterations = [], []
    position = 0
    for number, section in enumerate(coordinates.sections):
        order = range(iterations.num_iterations if section.is_sweep else 1)
        for iteration in reversed(order) if section.reverse else order:
            template = iterations.template(iteration) if section.is_sweep else 0
            span = coordinates.slice_of(number, template)
            size = span.stop - span.start
            starts[number, iteration] = position
            sources.append(np.arange(span.start, span.stop))
            new_iterations.append(np.full(size, iteration if section.is_sweep else -1))
            position += size
    source: Integers = np.concatenate(sources)
    new_iteration: Integers = np.concatenate(new_iterations)
    columns = {name: getattr(recording, name)[source] for name in COLUMNS}
    in_loop = columns["loop"] == recording.loops.index(iterations.loop)
    columns["iteration"] = np.where(in_loop, new_iteration, columns["iteration"])
    columns["num_bytes"] = columns["num_bytes"] + growth[source] * num_more
    source_of_free = _source_of_free(coordinates, iterations, source, new_iteration)
    columns["label"] = recording.label[source_of_free]
    columns |= _repeat_frees(
        recording,
        coordinates,
        iterations,
        source=source_of_free,
        iteration=new_iteration,
        starts=starts,
        is_relative=is_relative,
    )
    return replace(recording, **columns), source


def _source_of_free(
    coordinates: Coordinates, iterations: Iterations, source: Integers, iteration: Integers
) -> Integers:
    """Return for each allocation the recorded allocation whose free it repeats.

    This is `source`, except where a repeated first template frees something in the iteration before
    it. In the result a template lies there, as before the second template of the recording, but not
    before the first one. So such a free is that of the second template.
    """
    own = coordinates.iteration[source]
    is_repeated = (own >= 1) & (own <= iterations.period) & (iteration != own)
    frees_before = is_repeated & (coordinates.free_iteration[source] == own - 1)
    shift = np.zeros((len(coordinates.sections), iterations.num_recorded), dtype=np.int64)
    for number, section in enumerate(coordinates.sections):
        for template in range(1, iterations.period + 1) if section.is_sweep else ():
            later = section.starts[template + iterations.period]
            shift[number, template] = later - section.starts[template]
    return np.where(frees_before, source + shift[coordinates.section[source], own], source)


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
    """Return the columns that say when and where the repeated allocations are freed.

    Frees nearby keep their distance from the allocation's iteration; those farther away are counted
    from the nearer end of the loop.
    """
    own = coordinates.iteration[source]

    def shifted(recorded: Integers, is_near: Bools) -> Integers:
        from_end = recorded + iterations.num_iterations - iterations.num_recorded
        far = np.where(recorded < iterations.num_recorded // 2, recorded, from_end)
        return np.where(recorded < 0, -1, np.where(is_near, iteration + recorded - own, far))

    free_is_near, free_module_is_near = is_relative
    section, offset = coordinates.free_section[source], coordinates.free_offset[source]
    free_iteration = shifted(coordinates.free_iteration[source], free_is_near[source])
    of_module = recording.free_iteration[source]
    in_loop = recording.free_loop[source] == recording.loops.index(iterations.loop)
    freed_after = starts[section, np.maximum(free_iteration, 0)] + offset
    return {
        "freed_after": np.where(section < 0, NEVER, freed_after),
        "free_iteration": np.where(
            in_loop, shifted(of_module, free_module_is_near[source]), of_module
        ),
    }


def _repeat_work(
    recording: Recording, iterations: Iterations, *, growth: Mapping[tuple[object, ...], Integers]
) -> tuple[TraceWork, ...]:
    """Return the work, where a template's counts once for each iteration that repeats it."""
    counts = Counter(map(iterations.template, range(iterations.num_iterations)))
    num_more = iterations.num_iterations - iterations.num_recorded
    result = []
    for work in recording.work:
        if work.loop == iterations.loop:
            if (times := counts[work.iteration]) != 1:
                work = TraceWork(*work.place, *(times * number for number in work.sums))
        elif (more := growth.get(work.place)) is not None:
            sums = np.array(work.sums) + more * num_more
            work = TraceWork(*work.place, *sums.tolist())
        result.append(work)
    return tuple(result)
