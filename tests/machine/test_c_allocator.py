import pytest

from fitune.machine import libc as c_allocator
from fitune.machine.libc import (
    FIRST_STEP_BYTES,
    MAPPED,
    AllocatorHabit,
    Method,
    allocator_habit,
    allocator_name,
)
from fitune.units import GIB, MIB


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(c_allocator, "c_allocator", lambda: request.param)


def named(name: str | None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loaded", [name], indirect=True)


@named("glibc")
@pytest.mark.parametrize(
    ("threshold", "name"),
    [("65536", MAPPED), ("1048576", MAPPED), ("33554432", "glibc"), ("", "glibc"), ("x", "glibc")],
)
@pytest.mark.usefixtures("loaded")
def test_only_a_low_threshold_maps_the_large_blocks(threshold: str, name: str) -> None:
    assert allocator_name({"MALLOC_MMAP_THRESHOLD_": threshold}) == name


@named("tcmalloc")
@pytest.mark.usefixtures("loaded")
def test_the_threshold_is_glibcs_alone() -> None:
    assert allocator_name({"MALLOC_MMAP_THRESHOLD_": "65536"}) == "tcmalloc"


@named("glibc")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.usefixtures("loaded")
def test_glibc_as_it_comes_keeps_more_where_layers_are_recomputed(method: Method) -> None:
    without, with_it = (
        allocator_habit(method, recomputes=value, environment={}) for value in (False, True)
    )
    assert without.resident_bytes(GIB)[1] < with_it.resident_bytes(GIB)[1]


@named(None)
@pytest.mark.usefixtures("loaded")
def test_an_allocator_that_was_not_measured_gets_the_widest_interval() -> None:
    habit = allocator_habit("lora", recomputes=True, environment={})
    assert (habit.name, habit.share[0], habit.share[2]) == ("unknown", 0.0, 1.8)


def test_what_is_kept_is_a_share_with_a_bound() -> None:
    habit = AllocatorHabit("any", (0.0, 0.5, 1.0), (100, 200, 300))
    small, large = habit.resident_bytes(100 * MIB), habit.resident_bytes(GIB)
    kept = [
        [(size - first) // MIB for size, first in zip(side, FIRST_STEP_BYTES, strict=True)]
        for side in (small, large)
    ]
    assert kept == [[100, 150, 200], [1024, 1224, 1324]]
