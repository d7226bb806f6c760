"""The learning rate is a function of the share of the tokens that is done, and of nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.config import OptimConfig
from fitune.step.schedule import lr_factor

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_to_its_peak_at_the_end_of_the_warm_up(schedule: str) -> None:
    optim = OptimConfig(schedule=schedule, warmup=0.1)
    assert lr_factor(optim, 0.05) == pytest.approx(0.5)
    assert lr_factor(optim, 0.1) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_ends_at_its_final_share(schedule: str) -> None:
    optim = OptimConfig(schedule=schedule, final_lr_fraction=0.1)
    assert lr_factor(optim, 1.0) == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle_of_what_the_warm_up_leaves() -> None:
    assert lr_factor(OptimConfig(warmup=0.2), 0.6) == pytest.approx(0.5)


def test_wsd_holds_its_rate_until_a_tenth_is_left() -> None:
    optim = OptimConfig(schedule="wsd")
    assert lr_factor(optim, 0.9) == pytest.approx(1.0)
    assert lr_factor(optim, 0.95) == pytest.approx(0.5)


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_after_the_warm_up_the_rate_never_rises(
    schedule: str, warmup: float, first: float, second: float
) -> None:
    optim = OptimConfig(schedule=schedule, warmup=warmup)
    low, high = sorted((max(first, warmup), max(second, warmup)))
    assert lr_factor(optim, high) <= lr_factor(optim, low) + 1e-12


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_is_never_negative_and_never_above_its_peak(
    schedule: str, warmup: float, progress: float
) -> None:
    assert 0 <= lr_factor(OptimConfig(schedule=schedule, warmup=warmup), progress) <= 1
