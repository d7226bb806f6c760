from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.allocator.peaks import highest_peak, step_peaks
from fitune.errors import UsageError
from fitune.recorder.events import CATEGORIES, Category, MemoryEvent, MemoryTrace, Phase


def event(
    storage: int, num_bytes: int, category: Category = "activation", *, step: int = 1, phase: Phase = "forward",
    module: str = "",
) -> MemoryEvent:  # fmt: skip
    return MemoryEvent(storage, num_bytes, category, phase, step=step, module=module)


def traces() -> st.SearchStrategy[MemoryTrace]:
    """Storages that are born in some order and die in the same or not at all."""
    births = st.lists(
        st.tuples(st.integers(1, 10**6), st.sampled_from(CATEGORIES), st.booleans()), min_size=1
    )

    def build(items: list[tuple[int, Category, bool]]) -> MemoryTrace:
        events: list[MemoryEvent] = []
        for number, (num_bytes, category, dies) in enumerate(items):
            events.append(event(number, num_bytes, category))
            if dies:
                events.append(event(number, -num_bytes, category))
        return MemoryTrace(tuple(events))

    return births.map(build)


@given(traces())
def test_the_categories_at_the_peak_add_up_to_the_peak(trace: MemoryTrace) -> None:
    peak = highest_peak(trace)
    highest = max(accumulate(event.num_bytes for event in trace.events))
    assert sum(peak.categories.values()) == peak.num_bytes == highest


def test_the_peak_is_the_first_highest_point() -> None:
    trace = MemoryTrace((event(1, 5), event(1, -5), event(2, 5, phase="backward"), event(2, -5)))
    assert highest_peak(trace).event == 0


def test_the_last_step_has_a_peak_of_its_own() -> None:
    trace = MemoryTrace((event(1, 9), event(1, -9), event(2, 4, step=2, phase="optimizer")))
    last = step_peaks(trace, [2])[2]
    assert (highest_peak(trace).num_bytes, last.num_bytes, last.phase) == (9, 4, "optimizer")


def test_what_is_alive_at_the_peak_is_named_largest_first() -> None:
    events = (
        event(1, 3, module="a"),
        event(2, 9, module="b"),
        event(3, 2, module="a"),
        event(4, 1, module="a"),
    )
    peak = highest_peak(MemoryTrace((*events[:3], event(3, -2, module="a"), events[3])))
    assert [(module.name, module.num_bytes) for module in peak.modules] == [("b", 9), ("a", 5)]
    assert [tensor.num_bytes for tensor in peak.tensors] == [9, 3, 2]


def test_blocks_of_an_allocator_can_be_counted_instead() -> None:
    trace = MemoryTrace((event(1, 100), event(2, 700), event(1, -100)))
    peak = step_peaks(trace, [1], allocated_changes=np.array([512, 1024, -512]))[1]
    assert (peak.event, peak.num_bytes, peak.tensors[0].num_bytes) == (1, 1536, 1024)


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(UsageError, match="no event"):
        highest_peak(MemoryTrace(()))
