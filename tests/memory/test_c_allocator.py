import pytest

from fitune.memory import c_allocator
from fitune.memory.c_allocator import (
    FIRST_STEP_BYTES,
    MAPPED,
    AllocatorFactor,
    Method,
    allocator_factor,
    allocator_name,
)
from fitune.units import GIB


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
    without, with_it = (allocator_factor(method, recomputes=value, environment={}) for value in (False, True))
    assert without.expected < with_it.expected


@named(None)
@pytest.mark.usefixtures("loaded")
def test_an_allocator_that_was_not_measured_gets_the_widest_interval() -> None:
    factor = allocator_factor("lora", recomputes=True, environment={})
    assert factor.name == "unknown"
    assert (factor.low, factor.high) == (1.0, 2.7)


def test_the_first_step_is_counted_once() -> None:
    low, expected, high = AllocatorFactor("any", 1.0, 1.5, 2.0).resident_bytes(GIB)
    assert (low, expected, high) == tuple(
        int(factor * GIB) + first for factor, first in zip((1.0, 1.5, 2.0), FIRST_STEP_BYTES, strict=True)
    )
