"""Each alarm rings when its condition begins, and none rings in a run where nothing is wrong."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fitune.run.memory import MemorySample
from fitune.run.metrics import RunEvent, StepMetrics
from fitune.units import GIB, MIB
from fitune.watch.alarms import QUIET_SECONDS, Alarms, AlarmSettings

CARD = AlarmSettings(clip=1.0, on_cpu=False, save_bytes=2 * GIB, predicted_bytes=17 * GIB)
HOST = replace(CARD, on_cpu=True)
SAMPLE = MemorySample(
    time=0.0, step=0, allocated_bytes=12 * GIB, reserved_bytes=16 * GIB, peak_allocated_bytes=15 * GIB, num_retries=0,
    device_used_bytes=18 * GIB, device_total_bytes=24 * GIB, other_processes_bytes=GIB, spill_bytes=0,
    disk_free_bytes=500 * GIB,
)  # fmt: skip
STEP = StepMetrics(
    step=1, tokens=8000, supervised_tokens=4000, total_tokens=8000, loss=2.0, lr=1e-4, grad_norm=0.7, seconds=0.4,
    tokens_per_second=20_000.0, num_micro_batches=4, micro_batch=6, peak_allocated_bytes=15 * GIB,
    peak_reserved_bytes=16 * GIB,
)  # fmt: skip
HELD_BYTES = 2 * GIB


def rung_by_samples(samples: list[MemorySample], settings: AlarmSettings = CARD) -> list[RunEvent]:
    """One sample a second."""
    alarms = Alarms(settings)
    return [
        event
        for second, sample in enumerate(samples)
        for event in alarms.sample(replace(sample, time=float(second)))
    ]


def rung_by_steps(
    change: Callable[[int], dict[str, float | int | None]],
    *,
    num_steps: int = 80,
    held: Callable[[int], int | None] = lambda step: HELD_BYTES,
    settings: AlarmSettings = CARD,
) -> list[RunEvent]:
    """change: what differs from STEP, by step. One step a second."""
    alarms = Alarms(settings)
    rung = []
    for step in range(1, num_steps + 1):
        metrics = replace(STEP, step=step, **change(step))
        rung += alarms.step(metrics, held_bytes=held(step), now=float(step))
    return rung


def kinds(events: list[RunEvent]) -> list[str]:
    return [event.kind for event in events]


def test_headroom_under_the_margin_rings() -> None:
    full = replace(SAMPLE, device_used_bytes=24 * GIB - 100 * MIB, reserved_bytes=15 * GIB)
    (event,) = rung_by_samples([SAMPLE, full])
    assert event.kind == "headroom"
    assert "100.0 MiB of 24.0 GiB" in event.message


def test_what_the_cache_can_give_back_is_headroom() -> None:
    assert rung_by_samples([replace(SAMPLE, device_used_bytes=24 * GIB - 100 * MIB)]) == []


def test_another_process_that_grows_rings_at_each_growth() -> None:
    later = [replace(SAMPLE, other_processes_bytes=size * GIB) for size in (1, 6, 6, 3, 3)]
    far_apart = [replace(sample, time=index * QUIET_SECONDS) for index, sample in enumerate(later)]
    far_apart.append(replace(SAMPLE, time=9 * QUIET_SECONDS, other_processes_bytes=4 * GIB))
    alarms = Alarms(CARD)
    rung = [event for sample in far_apart for event in alarms.sample(sample)]
    assert kinds(rung) == ["other_processes", "other_processes"]
    assert "took 5.0 GiB more: they now hold 6.0 GiB" in rung[0].message


def test_other_processes_of_a_host_may_move_more() -> None:
    moved = [SAMPLE, replace(SAMPLE, other_processes_bytes=2 * GIB)]
    assert kinds(rung_by_samples(moved, CARD)) == ["other_processes"]
    assert rung_by_samples(moved, HOST) == []


@pytest.mark.parametrize(
    ("settings", "words"), [(CARD, "instead of the card"), (HOST, "swapped out")]
)
def test_spilling_rings_at_the_second_sample(settings: AlarmSettings, words: str) -> None:
    spilled = replace(SAMPLE, spill_bytes=GIB)
    assert rung_by_samples([SAMPLE, spilled, SAMPLE, spilled], settings) == []
    (event,) = rung_by_samples([spilled, spilled, spilled], settings)
    assert event.kind == "spill"
    assert words in event.message


def test_an_emptied_cache_rings() -> None:
    (event,) = rung_by_samples(
        [SAMPLE, replace(SAMPLE, num_retries=3), replace(SAMPLE, num_retries=3)]
    )
    assert (event.kind, "3 times" in event.message) == ("retry", True)


def test_a_disk_without_room_for_two_saves_rings() -> None:
    (event,) = rung_by_samples([replace(SAMPLE, disk_free_bytes=3 * GIB)] * 2)
    assert (event.kind, "two saves take 4.0 GiB" in event.message) == ("disk", True)


def test_memory_that_grows_from_step_to_step_rings_with_its_rate() -> None:
    (event,) = rung_by_steps(lambda step: {}, held=lambda step: HELD_BYTES + step * 4 * MIB)
    assert (event.kind, "4.0 MiB a step" in event.message) == ("leak", True)


def test_a_leak_on_a_host_must_be_larger_than_its_noise() -> None:
    assert (
        rung_by_steps(lambda step: {}, held=lambda step: HELD_BYTES + step * 4 * MIB, settings=HOST)
        == []
    )
    assert kinds(
        rung_by_steps(
            lambda step: {}, held=lambda step: HELD_BYTES + step * 20 * MIB, settings=HOST
        )
    ) == ["leak"]


def test_memory_that_grows_once_is_no_leak() -> None:
    assert rung_by_steps(lambda step: {}, held=lambda step: HELD_BYTES + (step > 30) * GIB) == []


def test_reserved_memory_that_falls_to_pieces_rings() -> None:
    (event,) = rung_by_steps(
        lambda step: {
            "peak_allocated_bytes": 12 * GIB,
            "peak_reserved_bytes": (12 if step < 30 else 16) * GIB,
        },
        num_steps=120,
    )
    assert (event.kind, "25% of PyTorch's reserved memory" in event.message) == (
        "fragmentation",
        True,
    )


def test_more_than_was_planned_rings() -> None:
    (event,) = rung_by_steps(lambda step: {"peak_reserved_bytes": (18 if step == 40 else 16) * GIB})
    assert event.kind == "prediction"
    assert "step 40 took 18.0 GiB, 5.9% more than the 17.0 GiB" in event.message


def test_what_a_prediction_promises_to_be_within_does_not_ring() -> None:
    def a_little_more(step: int) -> dict[str, float | int | None]:
        return {
            "peak_reserved_bytes": int(17.7 * GIB)
        }  # 4 %, which steps of other lengths leave between their blocks

    assert rung_by_steps(a_little_more) == []
    assert (
        rung_by_steps(
            lambda step: {"peak_reserved_bytes": 30 * MIB},
            settings=replace(HOST, predicted_bytes=MIB),
        )
        == []
    )


def test_a_loss_far_above_the_ones_before_rings() -> None:
    (event,) = rung_by_steps(
        lambda step: {"loss": 9.0 if step == 60 else 2.0 + 0.1 * math.sin(step)}
    )
    assert (event.kind, event.step) == ("loss_spike", 60)


def test_clipping_more_than_half_of_the_steps_rings() -> None:
    (event,) = rung_by_steps(lambda step: {"grad_norm": 5.0 if step % 3 else 0.5})
    assert (event.kind, "68% of the last 50 steps" in event.message) == ("clipping", True)


def test_without_clipping_no_norm_is_too_large() -> None:
    assert rung_by_steps(lambda step: {"grad_norm": 1e6}, settings=replace(CARD, clip=0.0)) == []


def test_an_alarm_that_comes_and_goes_rings_once_in_a_while() -> None:
    full = replace(SAMPLE, disk_free_bytes=MIB)
    assert len(rung_by_samples([SAMPLE, full] * 100)) == 1
    assert len(rung_by_samples([SAMPLE, full] * int(QUIET_SECONDS))) == 2


def clean_samples(seed: int) -> Iterator[MemorySample]:
    draw = random.Random(seed)
    for _ in range(400):
        others = draw.randint(900, 1100) * MIB
        yield replace(
            SAMPLE,
            allocated_bytes=draw.randint(2, 15) * GIB,
            other_processes_bytes=others,
            device_used_bytes=17 * GIB + others,
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", [CARD, HOST])
def test_nothing_rings_in_a_clean_run(seed: int, settings: AlarmSettings) -> None:
    """Losses fall with noise of 10 %, norms are seldom above 1, lengths make the peak move, a host's memory its own."""
    draw = random.Random(seed)
    assert rung_by_samples(list(clean_samples(seed)), settings) == []
    rung = rung_by_steps(
        lambda step: {
            "loss": 3.0 / (1 + step / 100) * draw.gauss(1, 0.1),
            "grad_norm": draw.lognormvariate(-0.7, 0.5),
            "peak_allocated_bytes": draw.randint(10, 15) * GIB,
        },
        num_steps=400,
        held=lambda step: HELD_BYTES + (draw.randint(0, 100) * MIB if settings.on_cpu else 0),
        settings=settings,
    )
    assert rung == []
