"""How often a run is evaluated and saved where nothing says so."""

import pytest

from fitune.training.length import steps_between_evals


@pytest.mark.parametrize(
    ("total_steps", "every"),
    [(1, 1), (2, 1), (3, 2), (8, 4), (10, 5), (20, 5), (49, 5), (60, 6), (124, 12), (10_000, 1000)],
)
def test_evaluations_are_ten_in_a_run_and_five_steps_apart(total_steps: int, every: int) -> None:
    assert steps_between_evals(total_steps) == every
