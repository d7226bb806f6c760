"""The tight loop for an allocator as it comes gives what the allocator that knows all rules gives."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fitune.memory import replay as replay_room
from fitune.memory.allocator import CachingAllocator
from fitune.memory.allocator_config import parse_allocator_config
from fitune.memory.plain_replay import is_plain
from fitune.memory.replay import ReplaySettings, replay
from fitune.trace.events import MemoryEvent, MemoryTrace
from fitune.units import MIB

SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.sampled_from([1, 512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB + 7, 20 * MIB, 45 * MIB]),
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
        allocator=draw(st.sampled_from(["", "pinned_use_background_threads:True", "per_process_memory_fraction:0.6"])),
        total_bytes=draw(st.none() | st.integers(16 * MIB, 300 * MIB)),
        used_by_others_bytes=draw(st.integers(0, 8 * MIB)),
        memory_fraction=fraction,
        warm_up_bytes=draw(st.sampled_from([0, 3 * MIB, 70 * MIB])),
        until_step=draw(st.none() | st.integers(0, 3)),
    )


@given(traces(), settings())
def test_the_tight_loop_gives_what_all_rules_give(trace: MemoryTrace, settings: ReplaySettings) -> None:
    allocator = CachingAllocator(
        settings.allocator,
        total_bytes=settings.total_bytes,
        used_by_others_bytes=settings.used_by_others_bytes,
        memory_fraction=settings.memory_fraction,
    )
    columns = trace.columns()
    expected = replay_room._replay_by_all_rules(columns, settings, allocator)
    found = replay(trace, settings)
    # an event that is no allocation has no block; the failing one has one of 0 bytes in both
    assert found == expected


def test_settings_that_add_a_rule_are_not_for_the_tight_loop() -> None:
    texts = ("expandable_segments:True", "max_split_size_mb:64", "garbage_collection_threshold:0.5")
    assert not any(is_plain(parse_allocator_config(text)) for text in texts)
    assert is_plain(parse_allocator_config("per_process_memory_fraction:0.5"))


def test_a_storage_that_is_allocated_twice_is_not_for_the_tight_loop() -> None:
    event = MemoryEvent(1, 512, "temporary", "forward", 1)
    assert not replay_room._is_simple(MemoryTrace((event, replace(event, num_bytes=-512), event)).columns())
