from dataclasses import replace

import pytest

from fitune.allocator.prediction import PredictSettings, predict_steps, predict_trace
from fitune.allocator.replay import ReplaySettings, replay
from fitune.machine.cards import Device
from fitune.machine.devices import cpu_device, find_device
from fitune.recorder.events import MemoryEvent, MemoryTrace, Phase
from fitune.units import MIB


def trace(*sizes: tuple[int, int], phase: Phase = "backward") -> MemoryTrace:
    """Storage and MiB."""
    return MemoryTrace(
        tuple(
            MemoryEvent(storage, mib * MIB, "activation", phase, step=1) for storage, mib in sizes
        ),
        ("assumed: x",),
    )


def card(total_mib: int) -> Device:
    device = find_device("RTX 3090")
    assert device.context is not None
    return replace(device, total_bytes=total_mib * MIB + device.context.expected_bytes)


FRAGMENTED = trace((1, 30), (2, 30), (1, -30), (3, 40))  # the 30 MiB hole is too small for 40


def test_allocated_and_reserved_are_the_replays() -> None:
    prediction = predict_trace(FRAGMENTED, PredictSettings())
    result = replay(FRAGMENTED, ReplaySettings())
    last = max(result.step_peaks)
    assert result.step_peaks[last] == (70 * MIB, 100 * MIB)
    assert (prediction.peak_allocated_bytes, prediction.peak_reserved_bytes) == (
        70 * MIB,
        100 * MIB,
    )


def test_the_categories_add_up_to_the_allocated_bytes() -> None:
    odd = MemoryTrace(
        tuple(MemoryEvent(i, 11 * MIB + i, "temporary", "forward", step=1) for i in range(3))
    )
    prediction = predict_trace(odd, PredictSettings())
    assert sum(prediction.categories.values()) == prediction.peak_allocated_bytes
    assert prediction.peak_allocated_bytes == replay(odd, ReplaySettings()).peak_allocated_bytes


def test_the_device_also_holds_the_context() -> None:
    device = card(200)
    assert device.context is not None
    prediction = predict_trace(FRAGMENTED, PredictSettings(device=device))
    assert prediction.device_bytes == 100 * MIB + device.context.expected_bytes
    assert prediction.device_interval is not None
    assert prediction.device_interval.low_bytes == 100 * MIB + device.context.low_bytes


def test_a_roomy_card_needs_no_retry() -> None:
    prediction = predict_trace(FRAGMENTED, PredictSettings(device=card(200)))
    assert (prediction.fits, prediction.num_alloc_retries) == (True, 0)


def test_a_card_that_holds_the_blocks_but_not_the_cache_fits_with_retries() -> None:
    prediction = predict_trace(FRAGMENTED, PredictSettings(device=card(80)))
    assert (prediction.fits, prediction.num_alloc_retries) == (True, 1)
    assert prediction.peak_reserved_bytes == 70 * MIB


def test_a_card_that_is_too_small_names_the_allocation_that_fails() -> None:
    prediction = predict_trace(FRAGMENTED, PredictSettings(device=card(60)))
    assert prediction.fits is False
    assert prediction.first_oom is not None
    assert prediction.first_oom.requested_bytes == 40 * MIB
    assert prediction.peak_reserved_bytes == 100 * MIB


def test_what_plainly_does_not_fit_need_not_name_the_allocation_that_fails() -> None:
    shown = predict_trace(FRAGMENTED, PredictSettings(device=card(60)))
    short = predict_trace(FRAGMENTED, PredictSettings(device=card(60), find_oom=False))
    assert shown.first_oom is not None
    assert short == replace(shown, first_oom=None, num_alloc_retries=0)


def test_what_may_fit_is_replayed_even_where_no_failure_is_asked_for() -> None:
    settings = PredictSettings(device=card(80))
    assert predict_trace(FRAGMENTED, replace(settings, find_oom=False)) == predict_trace(
        FRAGMENTED, settings
    )
    assert predict_trace(FRAGMENTED, settings).num_alloc_retries == 1


def test_a_step_before_the_one_that_fails_fits() -> None:
    events = (
        MemoryEvent(1, 30 * MIB, "input", "forward", 1),
        MemoryEvent(2, 60 * MIB, "input", "forward", 2),
    )
    settings = PredictSettings(device=card(70))
    first, second = predict_steps(MemoryTrace(events), settings, (1, 2))
    assert (first.fits, first.first_oom, second.fits) == (True, None, False)


def test_the_first_step_that_fails_fails_the_later_ones() -> None:
    events = (
        MemoryEvent(1, 90 * MIB, "input", "forward", 1),
        MemoryEvent(1, -90 * MIB, "input", "forward", 1),
        MemoryEvent(2, 10 * MIB, "input", "forward", 2),
    )
    for find_oom in (True, False):
        settings = PredictSettings(device=card(70), find_oom=find_oom)
        assert [each.fits for each in predict_steps(MemoryTrace(events), settings, (1, 2))] == [
            False,
            False,
        ]


def test_a_loaders_block_is_reserved_from_the_start() -> None:
    prediction = predict_trace(trace((1, 30)), PredictSettings(warm_up_bytes=64 * MIB))
    assert prediction.peak_reserved_bytes == 64 * MIB


def test_on_a_cpu_the_requested_bytes_are_counted() -> None:
    events = MemoryTrace((MemoryEvent(1, 1000, "activation", "forward", step=1),))
    prediction = predict_trace(events, PredictSettings(device=cpu_device()))
    assert (prediction.peak_allocated_bytes, prediction.device_bytes) == (1000, None)


def test_what_was_assumed_comes_along() -> None:
    assert predict_trace(FRAGMENTED, PredictSettings()).assumptions == ("assumed: x",)


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_the_phase_of_the_peak_is_named(phase: Phase) -> None:
    assert predict_trace(trace((1, 30), phase=phase), PredictSettings()).peak_phase == phase


def test_the_peaks_of_all_steps_are_told() -> None:
    events = [MemoryEvent(1, 30 * MIB, "parameter", "load", step=0)]
    for step, mib in ((1, 10), (2, 50), (3, 20)):
        events += [
            MemoryEvent(step + 1, sign * mib * MIB, "activation", "forward", step=step)
            for sign in (1, -1)
        ]
    prediction = predict_trace(MemoryTrace(tuple(events)), PredictSettings())
    assert [(each.step, each.allocated_bytes // MIB, each.reserved_bytes // MIB) for each in prediction.step_peaks] == [
        (1, 40, 40), (2, 80, 90), (3, 50, 90),
    ]  # fmt: skip
    assert prediction.peak_allocated_bytes == prediction.step_peaks[-1].allocated_bytes
