"""Recordings held against the genuine allocator, event by event: golden steps (tests/golden/steps), which PyTorch's
CUDA build asked for on a rehearsed card (`python -m rehearsal.golden`), recorded here again on any torch and no card.

What is compared: the bytes of every allocation in its order, and between two allocations the bytes of all that is freed
there. In which order these are freed is not compared: within one operator it follows from C++ destructors on the one
side and from Python's reference counts on the other, and it changes nothing, since the allocator joins neighbours that
are free and looks for the next block only when the next allocation comes. Storages are not compared by their number
either: it follows from the order of births.

The files were made with the torch that they name, the recordings with the one that runs the tests. Where PyTorch
behaves differently in the two, the recording follows a rule with versions, and the reason below says so.
"""

import tempfile
from functools import cache
from pathlib import Path

import pytest

from fitune.trace.difference import first_difference
from fitune.trace.events import MemoryTrace
from rehearsal.golden import (
    CATALOGUE,
    DIRECTORY,
    NUM_KEPT,
    SUFFIX,
    Golden,
    last_steps,
    num_steps,
    read_golden,
)
from rehearsal.predicted import recorded_case

FILES = {path.name.removesuffix(SUFFIX): path for path in sorted(DIRECTORY.glob(f"*{SUFFIX}"))}

PEAK_NOT_YET: dict[str, str] = {}
"""Files whose peaks are not the recorded ones yet, and why."""

EVENTS_NOT_YET: dict[str, str] = {}
"""Files that some event of is not the recorded one yet, and why."""


@cache
def golden(name: str) -> Golden:
    return read_golden(FILES[name])


@cache
def recorded(name: str) -> MemoryTrace:
    case = golden(name).case
    with tempfile.TemporaryDirectory() as directory:
        gpu = CATALOGUE[golden(name).card]
        return last_steps(recorded_case(case, gpu, Path(directory), num_steps=num_steps(case)))


def peaks(trace: MemoryTrace) -> tuple[int, ...]:
    """Requested bytes of each step."""
    alive = 0
    most: dict[int, int] = {}
    for event in trace.events:
        before, alive = alive, alive + event.num_bytes
        most[event.step] = max(most.get(event.step, before), alive)
    return tuple(most[step] for step in range(1, NUM_KEPT + 1))


def test_there_are_enough_settings() -> None:
    assert len(FILES) >= 40


@pytest.mark.parametrize("name", FILES)
def test_the_file_holds_what_the_allocator_counted(name: str) -> None:
    assert peaks(golden(name).trace) == golden(name).peaks


@pytest.mark.parametrize("name", FILES)
def test_the_recorded_peaks_are_the_genuine_ones_but_for_those_listed(name: str) -> None:
    equal = peaks(recorded(name)) == golden(name).peaks
    assert equal != (name in PEAK_NOT_YET), f"{peaks(recorded(name))} recorded, {golden(name).peaks} genuine"


@pytest.mark.parametrize("name", FILES)
def test_every_recorded_event_is_the_genuine_one_but_for_those_listed(name: str) -> None:
    difference = first_difference(recorded(name), golden(name).trace)
    assert (difference is None) != (name in EVENTS_NOT_YET), str(difference)


def test_the_lists_name_files_that_are_there() -> None:
    assert {*PEAK_NOT_YET, *EVENTS_NOT_YET} <= {*FILES}
