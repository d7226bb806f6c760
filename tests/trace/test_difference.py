from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from fitune.recorder.events import MemoryEvent, MemoryTrace
from rehearsal.difference import first_difference


def trace(*sizes: int, step: int = 1) -> MemoryTrace:
    """Return a trace of allocations (positive) and of frees of any storage of that size (negative)."""
    return MemoryTrace(
        tuple(
            MemoryEvent(number, size, "temporary", "forward", step=step, op=f"op{number}")
            for number, size in enumerate(sizes)
        )
    )


def test_the_same_events_do_not_differ() -> None:
    assert first_difference(trace(5, 7, -5, 9, -7, -9), trace(5, 7, -5, 9, -7, -9)) is None


@given(st.permutations([3, 4, 5]))
def test_the_order_of_frees_between_two_allocations_is_no_difference(order: Sequence[int]) -> None:
    assert (
        first_difference(
            trace(3, 4, 5, -3, -4, -5, 6), trace(3, 4, 5, *(-size for size in order), 6)
        )
        is None
    )


def test_a_free_on_the_other_side_of_an_allocation_is_a_difference() -> None:
    assert first_difference(trace(3, -3, 4), trace(3, 4, -3)) is not None


def test_the_first_difference_has_both_neighbours() -> None:
    difference = first_difference(trace(1, 2, 3, 4), trace(1, 2, 99, 4))
    assert difference is not None
    assert difference.index == 2
    assert [moment and moment.sizes[0] for moment in difference.predicted] == [2, 3, 4]
    assert [moment and moment.sizes[0] for moment in difference.measured] == [2, 99, 4]
    assert "predicted > +3 (step 1 forward, op2)" in str(difference)
    assert "measured  > +99" in str(difference)


def test_a_record_that_ends_early_differs_there() -> None:
    difference = first_difference(trace(1, 2), trace(1))
    assert difference is not None
    assert difference.measured[1] is None
    assert "measured  > (none)" in str(difference)


def test_what_came_before_the_steps_is_not_compared() -> None:
    loaded = MemoryTrace((*trace(8, 9, step=0).events, *trace(1, -9).events))
    assert (
        first_difference(loaded, MemoryTrace((*trace(9, 8, step=0).events, *trace(1, -9).events)))
        is None
    )
