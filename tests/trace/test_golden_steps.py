"""Recordings held against the genuine allocator, event by event: golden steps (tests/golden/steps), which PyTorch's
CUDA build asked for on a rehearsed card (`python -m rehearsal.golden`), recorded here again on any torch and no card.

What is compared: the bytes of every allocation in its order, and between two allocations the bytes of all that is freed
there. In which order these are freed is not compared: within one operator it follows from C++ destructors on the one
side and from Python's reference counts on the other, and it changes nothing, since the allocator joins neighbours that
are free and looks for the next block only when the next allocation comes. Storages are not compared by their number
either: it follows from the order of births.

`python -m rehearsal.golden --state` shows the first difference of each file.

The files were made with the torch that they name, the recordings with the one that runs the tests. Where PyTorch
behaves differently in the two, the recording follows a rule with versions, and takes that of the file.
"""

from functools import cache

import pytest

from fitune.recorder.events import MemoryTrace
from rehearsal.difference import first_difference
from rehearsal.golden import DIRECTORY, SUFFIX, Golden, peaks, read_golden, record

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
FILES = {path.name.removesuffix(SUFFIX): path for path in sorted(DIRECTORY.glob(f"*{SUFFIX}"))}


@cache
def golden(name: str) -> Golden:
    return read_golden(FILES[name])


@cache
def recorded(name: str) -> MemoryTrace:
    return record(golden(name))


def test_there_are_enough_settings() -> None:
    assert len(FILES) >= 40


def test_the_files_hold_what_the_allocator_counted() -> None:
    assert [name for name in FILES if peaks(golden(name).trace) != golden(name).peaks] == []


#: Loops of somebody else's that differ in their kernels; `make test-all` holds all recordings of loops.
LOOPS = {"loop-autocast-4090", "loop-cudnn-H100", "loop-flash-4090", "loop-gpt2-dropout-4090",
         "loop-padded-4090", "loop-scaler-T4"}  # fmt: skip
#: fitune's own step in each setting on one card, and in one setting on the others.
OWN_STEPS = {name for name in FILES if name.endswith("-4090") and not name.startswith("loop-")}
QUICK = LOOPS | OWN_STEPS | {"full-A100", "lora-H100", "recompute-T4"}


def test_every_quick_recording_is_there() -> None:
    assert sorted(QUICK - FILES.keys()) == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in FILES],
)
def test_every_recorded_event_is_the_genuine_one(name: str) -> None:
    assert peaks(recorded(name)) == golden(name).peaks
    assert first_difference(recorded(name), golden(name).trace) is None
