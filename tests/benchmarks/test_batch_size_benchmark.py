"""The benchmark of rates and batches, on losses that are known, and what the page says of the outcomes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import batch_size
from batch_size import (
    Outcome,
    Task,
    Trial,
    best_inside,
    half_width,
    measure,
    optimum,
    page,
    token_overhead,
)

RHO = 6.0
TASK = Task(
    name="tiny", model={"source": "somewhere/tiny"}, rows=4, lr=1e-3, factors=(1, 4), seeds=(0, 1), epochs=1.0,
    max_rows=100, max_length=64, eval_rows=10, with_more=True,
)  # fmt: skip


def pretended(trial: Trial, rho: float | None = None) -> Outcome:
    """Losses are parabolas of the rate in doublings, lowest where the gain says; the batch costs k / r(k) tokens."""
    gain = (1 + RHO) / (1 + RHO / trial.factor)
    told = 1.0 if rho is None else math.sqrt((1 + rho) / (1 + rho / trial.factor))
    factors = {
        "sqrt_gain": told,
        "sqrt_gain_weighted": told,
        "sqrt": math.sqrt(trial.factor),
        "linear": float(trial.factor),
    }
    lr = trial.lr * factors.get(trial.kind, 1.0)
    off = math.log2(lr / (4e-3 * math.sqrt(gain)))
    tokens = {"half": 0.5, "fixed": 2.0, "anneal": 2.0, "follow": 2.0}.get(trial.kind, 1.0)
    loss = (
        5
        + 0.1 * off**2
        - 0.2 * math.log(tokens)
        + 0.2 * math.log(token_overhead(RHO, trial.factor))
    )
    return Outcome(
        kind=trial.kind, factor=trial.factor, lr=trial.lr, seed=trial.seed, peak_lr=lr,
        eval_loss=loss + 0.01 * trial.seed, steps=100 // trial.factor, tokens=1000, cpu_seconds=1.0, rho=RHO,
        rho_weighted=1.0, overhead={str(k): token_overhead(RHO, k) for k in (2, 4, 8)},
    )  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    return measure(TASK, pretended, tmp_path / "found.json")


def test_the_grid_goes_on_until_its_best_is_inside() -> None:
    losses = best_inside(lambda lr: math.log2(lr / 8e-3) ** 2, 1e-3)
    assert sorted(losses) == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])


def test_a_rate_between_two_of_the_grid_is_found() -> None:
    losses = {lr: math.log2(lr / 1.5e-3) ** 2 + 3 for lr in (5e-4, 1e-3, 2e-3, 4e-3)}
    lr, loss = optimum(losses)
    assert (lr, loss) == pytest.approx((1.5e-3, 3.0))


def test_a_rate_at_the_edge_is_taken_as_it_is() -> None:
    assert optimum({1e-3: 2.0, 2e-3: 3.0}) == (1e-3, 2.0)


def test_the_rule_that_is_right_is_found_to_be_the_closest(found: dict[str, Any]) -> None:
    doublings = {rule: close["doublings"] for rule, close in found["closeness"].items()}
    assert min(doublings, key=lambda rule: doublings[rule]) == "sqrt_gain"
    assert doublings["sqrt_gain"] == pytest.approx(0, abs=1e-6)
    assert doublings["none"] == pytest.approx(math.log2(math.sqrt(7 / 2.5)))


def test_a_reference_beside_the_best_rate_shifts_a_rule_but_not_its_growth(tmp_path: Path) -> None:
    def beside(trial: Trial, rho: float | None = None) -> Outcome:
        """The best rates lie 0.4 doublings above a rate of the grid."""
        outcome = pretended(replace(trial, lr=trial.lr / 2**0.4), rho)
        return replace(outcome, lr=trial.lr, peak_lr=outcome.peak_lr * 2**0.4)

    rules = measure(TASK, beside, tmp_path / "found.json")["rules"]
    (rule,) = (each for each in rules if each["rule"] == "sqrt_gain")
    assert rule["doublings_from_optimum"] == pytest.approx(-0.4, abs=1e-6)
    assert rule["doublings_from_growth"] == pytest.approx(0, abs=1e-6)


def test_the_noise_of_a_single_row_is_read_at_a_larger_batch(tmp_path: Path) -> None:
    def noisy(trial: Trial, rho: float | None = None) -> Outcome:
        return replace(pretended(trial, rho), rho=1e6 if trial.factor == 1 else RHO / trial.factor)

    found = measure(replace(TASK, rows=1, noise_factor=4), noisy, tmp_path / "found.json")
    assert (found["rho"], found["rho_unpaired"]) == (pytest.approx(RHO), 1e6)
    assert found["closeness"]["sqrt_gain"]["doublings"] == pytest.approx(0, abs=1e-6)


def test_more_seeds_train_only_what_is_new(found: dict[str, Any], tmp_path: Path) -> None:
    trained: list[Trial] = []

    def counted(trial: Trial, rho: float | None = None) -> Outcome:
        trained.append(trial)
        return pretended(trial, rho)

    measure(replace(TASK, seeds=(0, 1, 2)), counted, tmp_path / "found.json")
    assert {trial.seed for trial in trained} == {2}


def test_a_rule_is_set_beside_the_best_seed_by_seed(tmp_path: Path) -> None:
    def spread(trial: Trial, rho: float | None = None) -> Outcome:
        """What the seeds share cancels; linear has a spread of its own."""
        outcome = pretended(trial, rho)
        own = 0.1 * trial.seed if trial.kind == "linear" else 0.0
        return replace(outcome, eval_loss=outcome.eval_loss + trial.seed + own)

    rules = {each["rule"]: each for each in measure(TASK, spread, tmp_path / "found.json")["rules"]}
    assert rules["sqrt"]["above_best_reach"] == pytest.approx(0, abs=1e-6)
    assert rules["linear"]["above_best_reach"] == pytest.approx(12.71 * 0.05 / 5.6, rel=0.1)


def test_the_overhead_of_a_larger_batch_is_read_off_the_curve(found: dict[str, Any]) -> None:
    (overhead,) = found["overhead"]
    assert overhead["predicted"] == pytest.approx(10 / 7)
    assert overhead["measured"] == pytest.approx(10 / 7, rel=0.2)


def test_a_benchmark_that_was_stopped_trains_nothing_twice(
    found: dict[str, Any], tmp_path: Path
) -> None:
    def never(trial: Trial, rho: float | None = None) -> Outcome:
        raise AssertionError(trial)

    again = measure(TASK, never, tmp_path / "found.json")
    assert json.dumps(again) == json.dumps(found)


def test_another_task_is_measured_anew(found: dict[str, Any], tmp_path: Path) -> None:
    trained: list[Trial] = []

    def counted(trial: Trial, rho: float | None = None) -> Outcome:
        trained.append(trial)
        return pretended(trial, rho)

    measure(replace(TASK, rows=8), counted, tmp_path / "found.json")
    assert len(trained) == len(found["outcomes"])


def test_a_run_that_is_too_short_for_the_weighted_noise_is_not_judged_by_it(tmp_path: Path) -> None:
    found = measure(
        TASK,
        lambda trial, rho: replace(pretended(trial, rho), rho_weighted=None),
        tmp_path / "found.json",
    )
    assert "sqrt_gain_weighted" not in found["closeness"]
    assert "or n/a times, weighted" in page({"tiny": found})


def test_an_interval_of_two_values_is_wide_and_of_one_there_is_none() -> None:
    assert half_width([1.0]) is None
    assert half_width([1.0, 2.0]) == pytest.approx(12.71 * 0.5, rel=0.01)


def test_the_page_says_what_was_measured() -> None:
    written = (
        batch_size.PAGE.read_text().split(batch_size.PLACE[0])[1].split(batch_size.PLACE[1])[0]
    )
    assert written.strip() == page(json.loads(batch_size.RESULT.read_text())).strip()


def test_the_words_of_the_page_hold_for_the_tiny_model() -> None:
    found = json.loads(batch_size.RESULT.read_text())["tiny"]
    above = {rule: close["above_best_fraction"] for rule, close in found["closeness"].items()}
    assert (
        max(above["sqrt_gain"], above["sqrt"], above["sqrt_gain_weighted"])
        < 0.01
        < min(above["none"], above["linear"])
    )
    (at_twice,) = (
        each for each in found["rules"] if (each["rule"], each["factor"]) == ("sqrt_gain", 2)
    )
    assert (
        at_twice["above_best_fraction"]
        > 0.01
        > at_twice["above_best_fraction"] - at_twice["above_best_reach"]
    )
    assert all(
        each["low"] < 0 < each["high"] and each["steps"] < 0.8 * each["fixed_steps"]
        for each in found["modes"]
    )
    *_, largest = found["overhead"]
    assert max(largest["predicted"], largest["predicted_weighted"]) < largest["measured_low"]
