"""Intervals of paired differences: they cover the truth as often as they say, and find no difference where none is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.report.thin import thin
from fitune.run.interval import differ, paired_interval

NUM_DRAWS = 250


def draw_runs(
    draw: np.random.Generator, num_rows: int, difference: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row losses of two runs: hard and easy rows in common, skewed noise of each run, weights that go with length."""
    weights = draw.integers(1, 200, num_rows).astype(float)
    rows = draw.gamma(4, 0.5, num_rows)
    noise = [0.1 * draw.standard_exponential(num_rows) for _ in range(2)]
    return rows + noise[0] + difference, rows + noise[1], weights


@pytest.mark.parametrize("num_rows", [12, 40, 100])
def test_intervals_cover_the_truth_at_their_stated_rate(num_rows: int) -> None:
    draw = np.random.default_rng(num_rows)
    covered = 0
    for _ in range(NUM_DRAWS):
        interval = paired_interval(*draw_runs(draw, num_rows, 0.03))
        assert interval is not None
        covered += interval.low <= 0.03 <= interval.high
    assert covered / NUM_DRAWS == pytest.approx(
        0.96, abs=0.03
    )  # 0.95, a little more where rows are few


def test_runs_that_are_alike_are_called_different_in_at_most_a_twentieth() -> None:
    draw = np.random.default_rng(7)
    found = [paired_interval(*draw_runs(draw, 40, 0.0)) for _ in range(NUM_DRAWS)]
    assert (
        sum(interval is not None and interval.excludes_zero for interval in found) / NUM_DRAWS
        <= 0.05 + 2 * (0.05 * 0.95 / NUM_DRAWS) ** 0.5
    )


def test_a_difference_well_above_the_noise_is_found() -> None:
    interval = paired_interval(*draw_runs(np.random.default_rng(3), 100, 0.1))
    assert interval is not None
    assert interval.low > 0


def test_pairing_finds_what_the_spread_of_rows_would_hide() -> None:
    one, two, weights = draw_runs(np.random.default_rng(5), 200, 0.05)
    assert differ(one, two, weights)
    assert not differ(one, np.random.default_rng(6).permutation(two), weights)


def test_identical_runs_differ_by_exactly_nothing() -> None:
    rows = np.random.default_rng(0).random(50)
    interval = paired_interval(rows, rows, np.ones(50))
    assert interval is not None
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)
    assert not interval.excludes_zero


def test_too_few_pairs_give_no_interval() -> None:
    assert paired_interval([1, 2, 3, 4], [1, 2, 3, 5], [1, 1, 1, 1]) is None
    assert paired_interval([1.0] * 9, [2.0] * 9, [0.0] * 9) is None


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=5, max_size=30), st.floats(-5, 5))
def test_an_interval_holds_its_mean(rows: list[float], shift: float) -> None:
    interval = paired_interval(np.array(rows) + shift, np.zeros(len(rows)), np.ones(len(rows)))
    assert interval is not None
    assert interval.low - 1e-9 <= interval.mean <= interval.high + 1e-9


@settings(deadline=None)
@given(st.lists(st.floats() | st.just(float("nan")), min_size=1, max_size=300), st.integers(4, 40))
def test_thinning_keeps_the_highest_and_the_lowest(values: list[float], most: int) -> None:
    column = np.array(values)
    kept = thin(column, most)
    assert len(kept) <= max(most, min(len(values), most))
    assert (np.diff(kept) > 0).all()
    if not np.isnan(column).all():
        assert np.nanmax(column[kept]) == np.nanmax(column)
        assert np.nanmin(column[kept]) == np.nanmin(column)
