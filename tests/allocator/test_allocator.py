"""The rules one by one, then what must hold for every configuration and every sequence."""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.allocator.rules import FIRST_ADDRESS, CachingAllocator, OutOfDeviceMemoryError
from fitune.errors import UsageError
from fitune.units import GIB, KIB, MIB


def allocated(num_bytes: int, config: str = "") -> int:
    allocator = CachingAllocator(config)
    allocator.allocate(num_bytes)
    return allocator.allocated_bytes


def reserved(num_bytes: int, config: str = "") -> int:
    allocator = CachingAllocator(config)
    allocator.allocate(num_bytes)
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("requested", "rounded"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB)]
)
def test_sizes_are_rounded_up_to_512_bytes(requested: int, rounded: int) -> None:
    assert allocated(requested) == rounded


@pytest.mark.parametrize(
    ("requested", "rounded"),
    [(2048, 2048), (2049, 2560), (5 * KIB + 1, 6 * KIB), (65 * MIB, 80 * MIB)],
)
def test_sizes_are_rounded_up_to_a_division_of_a_power_of_two(requested: int, rounded: int) -> None:
    assert allocated(requested, "roundup_power2_divisions:4") == rounded


def test_divisions_differ_by_interval() -> None:
    config = "roundup_power2_divisions:[1:2,16:4,>:1]"
    assert [allocated(size, config) for size in (9 * KIB, 3 * MIB + 1, 17 * MIB, 33 * MIB)] == [
        12 * KIB,
        3 * MIB + 512,
        20 * MIB,
        34 * MIB,
    ]


def test_no_bytes_change_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(0) == 0
    allocator.free(0)
    assert set(allocator.memory_stats().values()) == {0}


@pytest.mark.parametrize(
    ("requested", "segment"),
    [
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_a_segment_is_2_or_20_mib_or_made_to_measure(requested: int, segment: int) -> None:
    assert reserved(requested) == segment


def test_the_large_segment_can_be_configured() -> None:
    assert reserved(2 * MIB, "large_segment_size_mb:64") == 64 * MIB


def test_a_large_block_is_not_split_for_one_mib_or_less() -> None:
    assert (allocated(11 * MIB), allocated(11 * MIB - 512)) == (12 * MIB, 11 * MIB - 512)


def test_a_small_block_is_split_for_512_bytes() -> None:
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.allocate(512)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)


def test_an_expandable_large_block_is_split_for_512_bytes() -> None:
    assert allocated(20 * MIB - 512, "expandable_segments:True") == 20 * MIB - 512


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, fitting, small = (allocator.allocate(size * MIB) for size in (40, 30, 20))
    for address in (large, fitting, small):
        allocator.free(address)
    assert allocator.allocate(25 * MIB) == fitting


def test_of_equal_blocks_the_lowest_is_taken() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)
    allocator.free(second)
    allocator.free(first)
    assert allocator.allocate(30 * MIB) == first


def test_a_stream_takes_no_block_of_another() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MIB))
    allocator.allocate(30 * MIB, stream=1)
    assert allocator.reserved_bytes == 60 * MIB


def test_free_neighbours_become_one_block() -> None:
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    for i in (0, 2, 1, 3):
        allocator.free(parts[i])
    (segment,) = allocator.snapshot()
    assert [(block.num_bytes, block.state) for block in segment.blocks] == [(20 * MIB, "inactive")]


def test_a_small_request_takes_no_oversize_block() -> None:
    allocator = CachingAllocator("max_split_size_mb:32")
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(31 * MIB)
    assert allocator.reserved_bytes == 72 * MIB


@pytest.mark.parametrize(("cached", "reused"), [(52, True), (54, False)])
def test_an_oversize_request_takes_only_a_block_that_nearly_fits(cached: int, reused: bool) -> None:
    allocator = CachingAllocator("max_split_size_mb:32")
    allocator.free(allocator.allocate(cached * MIB))
    allocator.allocate(34 * MIB)
    assert (allocator.reserved_bytes == cached * MIB) is reused


def test_a_failing_driver_makes_the_cache_go_before_the_retry() -> None:
    allocator = CachingAllocator(total_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(70 * MIB)
    assert (allocator.num_alloc_retries, allocator.num_ooms, allocator.reserved_bytes) == (
        1,
        0,
        70 * MIB,
    )


def test_an_oversize_block_goes_before_the_rest_of_the_cache() -> None:
    allocator = CachingAllocator("max_split_size_mb:32", total_bytes=100 * MIB)
    for address in [allocator.allocate(size * MIB) for size in (20, 60)]:
        allocator.free(address)
    allocator.allocate(34 * MIB)
    assert (allocator.num_alloc_retries, allocator.reserved_bytes) == (0, 54 * MIB)


def test_a_failure_says_what_is_left_and_leaves_the_allocator_usable() -> None:
    allocator = CachingAllocator(total_bytes=100 * MIB, used_by_others_bytes=10 * MIB)
    kept = allocator.allocate(20 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        allocator.allocate(70 * MIB + 1)
    error = caught.value
    assert (
        error.requested_bytes,
        error.allocated_bytes,
        error.reserved_bytes,
        error.free_bytes,
    ) == (
        70 * MIB + 1,
        20 * MIB,
        20 * MIB,
        70 * MIB,
    )
    allocator.free(kept)
    allocator.allocate(90 * MIB)
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (2, 1)


def test_the_fraction_limits_reserved_memory_and_equality_passes() -> None:
    allocator = CachingAllocator(total_bytes=100 * MIB, memory_fraction=0.5)
    allocator.allocate(50 * MIB)
    with pytest.raises(OutOfDeviceMemoryError, match=r"50\.00 MiB allowed"):
        allocator.allocate(512)
    assert allocator.driver_calls.cuda_malloc == 1


def test_a_fraction_of_more_than_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is 1\.5, but must be from 0 to 1"):
        CachingAllocator(total_bytes=GIB, memory_fraction=1.5)


def test_garbage_collection_gives_back_the_segments_unused_for_longest() -> None:
    allocator = CachingAllocator(
        "garbage_collection_threshold:0.5", total_bytes=100 * MIB, memory_fraction=0.9
    )
    old, new = allocator.allocate(20 * MIB), allocator.allocate(22 * MIB)
    allocator.free(old)
    allocator.allocate(10 * MIB)
    allocator.free(new)
    allocator.allocate(24 * MIB)  # 52 MiB are reserved, and above 45 MiB the oldest goes
    assert sorted(segment.num_bytes // MIB for segment in allocator.snapshot()) == [20, 22, 24]
    allocator.allocate(26 * MIB)
    assert sorted(segment.num_bytes // MIB for segment in allocator.snapshot()) == [20, 24, 26]


def test_an_expandable_segment_grows_in_place() -> None:
    allocator = CachingAllocator("expandable_segments:True", total_bytes=GIB)
    first = allocator.allocate(50 * MIB)
    second = allocator.allocate(30 * MIB)
    assert second == first + 50 * MIB
    assert (allocator.reserved_bytes, allocator.num_segments) == (80 * MIB, 0)


def test_an_expandable_segment_gives_back_only_whole_pages() -> None:
    allocator = CachingAllocator("expandable_segments:True", total_bytes=GIB)
    kept, freed = allocator.allocate(30 * MIB), allocator.allocate(60 * MIB)
    allocator.free(freed)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.snapshot() == ()


def test_a_block_used_by_another_stream_is_active_until_the_next_allocation() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(30 * MIB)
    allocator.record_stream(block, stream=1)
    allocator.free(block)
    assert (allocator.allocated_bytes, allocator.active_bytes) == (0, 30 * MIB)
    assert allocator.snapshot()[0].blocks[0].state == "pending"
    assert allocator.allocate(30 * MIB) == block


def test_a_block_recorded_on_its_own_stream_is_free_at_once() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(30 * MIB, stream=2)
    allocator.record_stream(block, stream=2)
    allocator.free(block)
    assert allocator.active_bytes == 0


def test_peaks_start_again_after_a_reset() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MIB))
    allocator.reset_peaks()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (0, 30 * MIB)


configs = st.builds(
    ",".join,
    st.tuples(
        st.sampled_from(["", "expandable_segments:True"]),
        st.sampled_from(
            ["", "max_split_size_mb:64", "max_split_size_mb:70,max_non_split_rounding_mb:80"]
        ),
        st.sampled_from(
            ["", "roundup_power2_divisions:8", "roundup_power2_divisions:[1:2,8:4,>:1]"]
        ),
        st.sampled_from(["", "garbage_collection_threshold:0.4"]),
        st.sampled_from(["", "large_segment_size_mb:11", "large_segment_size_mb:64"]),
        st.sampled_from(["", "per_process_memory_fraction:0.77"]),
    ).map(lambda parts: [part for part in parts if part]),
)
sizes = st.one_of(st.integers(0, 4096), st.integers(0, 3 * MIB), st.integers(MIB, 120 * MIB))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), sizes, st.integers(0, 2)),
        st.tuples(st.just("free"), st.integers(0, 1000)),
        st.tuples(st.just("record_stream"), st.integers(0, 1000), st.integers(0, 2)),
        st.tuples(st.just("empty_cache")),
    ),
    max_size=60,
)


def check_consistent(allocator: CachingAllocator, live: dict[int, int]) -> None:
    segments = allocator.snapshot()
    blocks = [block for segment in segments for block in segment.blocks]
    assert sum(segment.num_bytes for segment in segments) == allocator.reserved_bytes
    total = {
        state: [b for b in blocks if b.state == state]
        for state in ("allocated", "pending", "inactive")
    }
    assert {b.address: b.requested_bytes for b in total["allocated"]} == live
    assert sum(b.num_bytes for b in total["allocated"]) == allocator.allocated_bytes
    assert sum(b.num_bytes for b in total["allocated"] + total["pending"]) == allocator.active_bytes
    assert (
        sum(b.requested_bytes for b in total["allocated"] + total["pending"])
        == allocator.requested_bytes
    )
    assert allocator.requested_bytes <= allocator.active_bytes <= allocator.reserved_bytes
    end = FIRST_ADDRESS
    for segment in segments:
        assert segment.address >= end
        end = segment.address
        for block in segment.blocks:
            assert block.address == end
            end += block.num_bytes
        states = [block.state for block in segment.blocks]
        assert ("inactive", "inactive") not in pairwise(states)
    split = [b for s in segments for b in s.blocks if not s.is_expandable and len(s.blocks) > 1]
    inactive_split = [b.num_bytes for b in split if b.state == "inactive"]
    assert (len(inactive_split), sum(inactive_split)) == (
        allocator.num_inactive_split,
        allocator.inactive_split_bytes,
    )
    if allocator.total_bytes is not None:
        assert allocator.free_bytes is not None
        assert allocator.free_bytes >= 0
    stats = allocator.memory_stats()
    for kind in ("allocated_bytes", "reserved_bytes"):
        pools = stats[f"{kind}.small_pool.current"] + stats[f"{kind}.large_pool.current"]
        assert pools == stats[f"{kind}.all.current"]
    for name in [name for name in stats if name.endswith(".peak")]:
        assert stats[name] >= stats[name.replace(".peak", ".current")]


@settings(max_examples=150, deadline=None)
@given(config=configs, total=st.sampled_from([None, 150 * MIB, 333 * MIB + 512]), actions=actions)
def test_every_sequence_keeps_the_books_right(
    config: str, total: int | None, actions: list[tuple[Any, ...]]
) -> None:
    allocator = CachingAllocator(config, total_bytes=total, used_by_others_bytes=3 * MIB)
    live: dict[int, int] = {}
    peaks = [0] * 5
    for name, *arguments in actions:
        if name == "allocate":
            with suppress(OutOfDeviceMemoryError):
                address = allocator.allocate(*arguments)
                if address:
                    live[address] = arguments[0]
        elif name == "empty_cache":
            allocator.empty_cache()
        elif live:
            address = list(live)[arguments[0] % len(live)]
            if name == "free":
                del live[address]
                allocator.free(address)
            else:
                allocator.record_stream(address, arguments[1])
        check_consistent(allocator, live)
        stats = allocator.memory_stats()
        now = [stats[key] for key in sorted(stats) if key.endswith("bytes.all.peak")]
        assert all(new >= old for new, old in zip(now, peaks, strict=True))
        peaks = now
    for address in live:
        allocator.free(address)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.active_bytes, allocator.snapshot()) == (0, 0, ())


@settings(max_examples=50, deadline=None)
@given(config=configs, actions=actions)
def test_a_card_that_is_large_enough_is_as_good_as_no_limit(
    config: str, actions: list[tuple[Any, ...]]
) -> None:
    config = ",".join(part for part in config.split(",") if not part.startswith("per_process"))
    counters = []
    for total in (None, 1024 * GIB):
        allocator, live = CachingAllocator(config, total_bytes=total), []
        for name, *arguments in actions:
            if name == "allocate":
                live.append(allocator.allocate(*arguments))
            elif name == "free" and live:
                allocator.free(live.pop(arguments[0] % len(live)))
        counters.append(allocator.memory_stats())
    assert counters[0] == counters[1]
