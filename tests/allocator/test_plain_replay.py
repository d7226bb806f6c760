"""The replay in C of an allocator with PyTorch's default settings gives what the one that knows all rules gives."""

import runpy
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_recordings import read_recording
from hypothesis import given
from hypothesis import strategies as st

from fitune.allocator import fast as plain_replay
from fitune.allocator import replay as replay_room
from fitune.allocator.config import parse_allocator_config
from fitune.allocator.fast import IS_COMPILED, is_plain, replay_plain
from fitune.allocator.replay import ReplaySettings, replay
from fitune.allocator.rules import CachingAllocator
from fitune.recorder.events import MemoryEvent, MemoryTrace
from fitune.units import MIB

SEVERAL_STREAMS = ("micro_streams", "micro_expandable_oom", "gpt_ddp_buckets")
GOLDEN = [
    path
    for path in sorted((Path(__file__).parents[1] / "golden/allocator").glob("*.json.gz"))
    if path.name.split("__")[1].split(".")[0] in ("default", "frac08", "frac088")
    and not path.name.startswith(SEVERAL_STREAMS)
]
SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.sampled_from(
        [
            1,
            512,
            513,
            MIB,
            MIB + 1,
            2 * MIB,
            10 * MIB - 512,
            10 * MIB,
            11 * MIB + 7,
            20 * MIB,
            45 * MIB,
        ]
    ),
)


@st.composite
def traces(draw: st.DrawFn) -> MemoryTrace:
    """Births, deaths in any order, also of what was never born, and emptied caches, over a few steps."""
    alive: list[tuple[int, int]] = []
    events = []
    step = draw(st.integers(0, 1))
    for number in range(draw(st.integers(1, 60))):
        kind = draw(st.integers(0, 20))
        if kind == 0:
            step += 1
        elif kind == 1:
            events.append(MemoryEvent(0, 0, "workspace", "forward", step))
        elif kind == 2:
            events.append(MemoryEvent(1000 + number, -512, "temporary", "forward", step))
        elif kind > 10 and alive:
            storage, num_bytes = alive.pop(draw(st.integers(0, len(alive) - 1)))
            events.append(MemoryEvent(storage, -num_bytes, "temporary", "forward", step))
        else:
            alive.append((number + 1, draw(SIZES)))
            events.append(MemoryEvent(*alive[-1], "temporary", "forward", step))
    return MemoryTrace(tuple(events))


@st.composite
def settings(draw: st.DrawFn) -> ReplaySettings:
    fraction = draw(st.sampled_from([None, 1.0, 0.8]))
    return ReplaySettings(
        allocator=draw(
            st.sampled_from(
                ["", "pinned_use_background_threads:True", "per_process_memory_fraction:0.6"]
            )
        ),
        total_bytes=draw(st.none() | st.integers(16 * MIB, 300 * MIB)),
        used_by_others_bytes=draw(st.integers(0, 8 * MIB)),
        memory_fraction=fraction,
        warm_up_bytes=draw(st.sampled_from([0, 3 * MIB, 70 * MIB])),
        until_step=draw(st.none() | st.integers(0, 3)),
    )


@given(traces(), settings())
def test_the_tight_loop_gives_what_all_rules_give(
    trace: MemoryTrace, settings: ReplaySettings
) -> None:
    allocator = CachingAllocator(
        settings.allocator,
        total_bytes=settings.total_bytes,
        used_by_others_bytes=settings.used_by_others_bytes,
        memory_fraction=settings.memory_fraction,
    )
    columns = trace.columns()
    expected = replay_room._replay_by_all_rules(columns, settings, allocator)
    found = replay(trace, settings)
    assert found == expected
    assert found.allocated_changes.tolist() == expected.allocated_changes.tolist()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_a_recording_of_the_real_allocator_on_one_stream_is_reproduced(path: Path) -> None:
    recording = read_recording(path)
    card = CachingAllocator(
        recording["config"],
        total_bytes=recording["vram_bytes"],
        used_by_others_bytes=recording["ctx_bytes"],
        memory_fraction=recording["memory_fraction"],
    )
    assert is_plain(card.config)
    sizes = {event[1]: event[2] for event in recording["events"] if event[0] == "a"}
    signs = {"a": 1, "f": -1, "e": 0}
    events = [
        (i, number, signs[kind] * sizes.get(number, 0))
        for i, (kind, number, *_) in enumerate((*event, 0) for event in recording["events"])
        if kind == "e" or (kind != "r" and sizes[number] > 0)
    ]
    at, storage, requested = np.array(events, dtype=np.int64).T.copy()
    limits = [limit for limit in (card.limit_bytes, card.free_bytes) if limit is not None]
    done = replay_plain(storage, requested, limit_bytes=min(limits))
    reserved = done.reserved_bytes
    changes = np.flatnonzero(np.diff(reserved, prepend=0))
    last = int(at[len(reserved) - 1])  # a recording may go on after a failure
    expected = [change for change in recording["reserved_changes"] if change[0] <= last]
    assert [[int(at[i]), int(reserved[i])] for i in changes] == expected
    assert (None if done.failed_at is None else last) == next(
        (oom["i"] for oom in recording["ooms"]), None
    )


@pytest.mark.skipif(not IS_COMPILED, reason="installed without a compiler")
def test_without_the_extension_all_rules_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        MemoryEvent(1, 3 * MIB, "temporary", "forward", 1),
        MemoryEvent(2, 512, "temporary", "forward", 1),
    ]
    trace = MemoryTrace(tuple(events))
    compiled = replay(trace, ReplaySettings())
    monkeypatch.setattr(replay_room, "IS_COMPILED", False)
    monkeypatch.delattr(replay_room, "replay_plain")
    assert replay(trace, ReplaySettings()) == compiled


@pytest.mark.skipif(not IS_COMPILED, reason="installed without a compiler")
def test_a_loop_that_was_compiled_with_other_constants_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fitune.allocator import _fast

    monkeypatch.setattr(_fast, "SMALL", 1)
    assert not runpy.run_path(plain_replay.__file__)["IS_COMPILED"]


@pytest.mark.skipif(
    shutil.which("cc") is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="there is no compiler",
)
def test_where_there_is_a_compiler_the_loop_is_in_c() -> None:
    assert IS_COMPILED, (
        "the extension was not built: make install, or python setup.py build_ext --inplace"
    )


@pytest.mark.skipif(not IS_COMPILED, reason="installed without a compiler")
@pytest.mark.parametrize(
    "change",
    [
        {"storage": [0, 2]},
        {"storage": [-1, 0]},
        {"requested": [1, 1 << 62]},
        {"storage": [0]},
        {"allocated_changes": [0, 0, 0]},
        {"num_storages": -1},
    ],
    ids=str,
)
def test_numbers_that_would_leave_the_memory_are_refused(change: dict[str, Any]) -> None:
    numbers = {
        "storage": [0, 1],
        "requested": [512, 512],
        "allocated_changes": [0, 0],
        "reserved_bytes": [0, 0],
    }
    columns = {
        name: np.array(each) for name, each in (numbers | change).items() if name != "num_storages"
    }
    from fitune.allocator import _fast

    counts = {"num_storages": change.get("num_storages", 2), "limit": plain_replay.NO_LIMIT}
    storage, requested = columns.pop("storage"), columns.pop("requested")
    with pytest.raises((ValueError, MemoryError)):
        _fast.replay(
            storage, requested, **columns, **counts, is_retried=np.zeros(2, dtype=np.bool_)
        )


def test_settings_that_add_a_rule_are_not_for_the_tight_loop() -> None:
    texts = ("expandable_segments:True", "max_split_size_mb:64", "garbage_collection_threshold:0.5")
    assert not any(is_plain(parse_allocator_config(text)) for text in texts)
    assert is_plain(parse_allocator_config("per_process_memory_fraction:0.5"))


def test_a_storage_that_is_allocated_twice_is_not_for_the_tight_loop() -> None:
    event = MemoryEvent(1, 512, "temporary", "forward", 1)
    assert not replay_room._is_simple(
        MemoryTrace((event, replace(event, num_bytes=-512), event)).columns()
    )
