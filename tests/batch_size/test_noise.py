"""The estimators are unbiased for any weights and any noise, and the formulas that look like them are not."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.batch_size.noise import (
    NoiseAverages,
    NoiseSample,
    estimate,
    momentum_sample,
    observe,
    observe_preconditioned,
    pairwise_sample,
    update_averages,
)
from fitune.batch_size.norms import GradientNorms

DRAWS, DIMENSIONS = 20_000, 32
SIGNAL = 1.0
Micro = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(
    *, num_micro: int, spread: float, noise_per: str, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(g [draws, micro, dimensions], weights [draws, micro], true variance of the step's gradient [draws]), where a
    micro-batch's noise is that of its tokens, or of one sequence however long it is."""
    random = np.random.default_rng(seed)
    weights = np.ceil(200 * np.exp(spread * random.standard_normal((DRAWS, num_micro))))
    scales = np.linspace(0.2, 2.0, DIMENSIONS)
    truth = np.full(DIMENSIONS, math.sqrt(SIGNAL / DIMENSIONS))
    deviation = 10 / np.sqrt(weights) if noise_per == "token" else np.ones_like(weights)
    noise = random.standard_normal((DRAWS, num_micro, DIMENSIONS)) * scales * deviation[..., None]
    shares = weights / weights.sum(axis=1, keepdims=True)
    variance = (shares**2 * deviation**2).sum(axis=1) * (scales**2).sum()
    return truth + noise, weights, variance


def norms(gradients: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    contributions = gradients * (weights / weights.sum(axis=1, keepdims=True))[..., None]
    return (contributions**2).sum(axis=2), (contributions.sum(axis=1) ** 2).sum(axis=1)


def z_score(values: np.ndarray, truth: float = 0.0) -> float:
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


SETTINGS = [
    (4, 0.0, "token"),
    (4, 1.0, "token"),
    (8, 1.0, "token"),
    (8, 0.6, "sequence"),
    (8, 1.0, "sequence"),
]


@pytest.mark.parametrize(("num_micro", "spread", "noise_per"), SETTINGS)
def test_signal_and_variance_are_unbiased(num_micro: int, spread: float, noise_per: str) -> None:
    gradients, weights, variance = draw(
        num_micro=num_micro, spread=spread, noise_per=noise_per, seed=1
    )
    squared, total = norms(gradients, weights)
    samples = [
        pairwise_sample(q, big_q, weights=n)
        for q, big_q, n in zip(squared, total, weights, strict=True)
    ]
    signal = np.array([sample.signal for sample in samples])
    step_variance = np.array([sample.variance / sample.tokens for sample in samples])
    assert abs(z_score(signal, SIGNAL)) < 4
    assert abs(z_score(step_variance - variance)) < 4


def equal_sizes(squared: np.ndarray, total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The signal by the formula for micro-batches of one size."""
    num_micro = weights.shape[1]
    return (total - squared.sum(axis=1)) / (1 - 1 / num_micro)


def mean_losses(squared: np.ndarray, total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same from the norms of each micro-batch's mean loss, set against the token-weighted step."""
    num_micro = weights.shape[1]
    shares = weights / weights.sum(axis=1, keepdims=True)
    small = (squared / shares**2).mean(axis=1)
    return (num_micro * total - small) / (num_micro - 1)


def independent_tokens(squared: np.ndarray, total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same where noise is taken to fall with every token of a sequence."""
    tokens = weights.sum(axis=1)
    variance = ((tokens[:, None] / weights * squared).sum(axis=1) - total) / (weights.shape[1] - 1)
    return total - variance


@pytest.mark.parametrize(
    ("formula", "noise_per"),
    [(equal_sizes, "token"), (mean_losses, "token"), (independent_tokens, "sequence")],
)
def test_the_formulas_of_other_libraries_fail_this_proof(
    formula: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], noise_per: str
) -> None:
    gradients, weights, _ = draw(num_micro=8, spread=1.0, noise_per=noise_per, seed=1)
    assert abs(z_score(formula(*norms(gradients, weights), weights), SIGNAL)) > 4


def test_the_ratio_of_averages_finds_the_noise_scale_where_the_mean_of_ratios_does_not() -> None:
    gradients, weights, variance = draw(num_micro=4, spread=0.5, noise_per="token", seed=2)
    truth = float((variance * weights.sum(axis=1)).mean() / SIGNAL)
    squared, total = norms(gradients, weights)
    averages, ratios = NoiseAverages(), []
    for q, big_q, n in zip(squared, total, weights, strict=True):
        sample = pairwise_sample(q, big_q, weights=n)
        assert sample is not None
        ratios.append(sample.variance / sample.signal)
        averages = update_averages(averages, sample, half_life_tokens=1e9)
    found = estimate(averages)
    assert found is not None
    assert found.scale_tokens == pytest.approx(truth, rel=0.05)
    assert abs(np.mean(ratios) / truth - 1) > 0.3


def test_the_bounds_hold_the_truth_as_often_as_they_say() -> None:
    gradients, weights, variance = draw(num_micro=8, spread=0.5, noise_per="token", seed=3)
    truth = float((variance * weights.sum(axis=1)).mean() / SIGNAL)
    squared, total = norms(gradients, weights)
    below = above = 0
    runs = DRAWS // 100
    for run in range(runs):
        averages = NoiseAverages()
        for index in range(100 * run, 100 * run + 100):
            sample = pairwise_sample(squared[index], total[index], weights=weights[index])
            assert sample is not None
            averages = update_averages(averages, sample, half_life_tokens=1e9)
        found = estimate(averages)
        assert found is not None
        below += truth < found.scale_low_tokens
        above += truth > found.scale_high_tokens
    assert below / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
    assert above / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)


def test_adams_memory_stands_in_where_a_step_has_one_micro_batch() -> None:
    """On a gradient that stands still: the product with an independent average is unbiased for the signal."""
    random = np.random.default_rng(4)
    beta, memory, samples = 0.9, np.zeros(DIMENSIONS), []
    truth = np.full(DIMENSIONS, math.sqrt(SIGNAL / DIMENSIONS))
    for step in range(DRAWS):
        gradient = truth + random.standard_normal(DIMENSIONS)
        if step > 100:
            samples.append(
                momentum_sample(float(gradient @ memory), float(gradient @ gradient), tokens=1)
            )
        memory = beta * memory + (1 - beta) * gradient
    assert np.mean([sample.signal for sample in samples]) == pytest.approx(SIGNAL, rel=0.03)
    assert np.mean([sample.variance for sample in samples]) == pytest.approx(DIMENSIONS, rel=0.03)


def test_the_bounce_ratio_is_one_while_descending_and_not_positive_around_a_minimum() -> None:
    random = np.random.default_rng(5)

    def run(start: float, *, steps: int) -> float:
        weights, memory, averages = (
            np.full(DIMENSIONS, start),
            np.zeros(DIMENSIONS),
            NoiseAverages(),
        )
        for step in range(steps):
            parts = 0.02 * weights + 0.1 * random.standard_normal((4, DIMENSIONS))
            gradient = parts.mean(axis=0)
            sample = pairwise_sample(
                list(((parts / 4) ** 2).sum(axis=1)), float(gradient @ gradient), weights=[1.0] * 4
            )
            assert sample is not None
            correction = 1 - 0.9**step
            dot = float(gradient @ memory) / correction if step else None
            averages = update_averages(averages, sample, half_life_tokens=200, dot=dot)
            memory = 0.9 * memory + 0.1 * gradient
            weights = weights - 5.0 * memory
        found = estimate(averages)
        assert found is not None
        assert found.bounce is not None
        return found.bounce

    assert run(3000.0, steps=25) > 0.3
    assert run(0.0, steps=1500) <= 0.1


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(1, 1e5)), min_size=2, max_size=12),
    st.floats(0, 1e6),
)
def test_signal_and_variance_always_add_up_to_the_squared_norm(
    parts: list[tuple[float, float]], total: float
) -> None:
    squared, weights = zip(*parts, strict=True)
    sample = pairwise_sample(squared, total, weights=weights)
    assert sample is not None
    assert sample.signal + sample.variance / sample.tokens == pytest.approx(
        total, abs=1e-6 * (1 + sum(squared)) * 1e3
    )


def test_a_step_with_one_target_bearing_micro_batch_tells_nothing() -> None:
    assert pairwise_sample([1.0], 1.0, weights=[10]) is None
    assert pairwise_sample([1.0, 0.0], 1.0, weights=[10, 0]) is None
    assert pairwise_sample([math.inf, 1.0], math.inf, weights=[10, 10]) is None


def test_drawing_without_replacement_leaves_less_noise() -> None:
    averages = NoiseAverages()
    for _ in range(3):
        averages = update_averages(averages, NoiseSample(1.0, 100.0, 10.0), half_life_tokens=1e6)
    found = estimate(averages)
    assert found is not None
    assert found.ratio(10) == pytest.approx(10.0)
    assert found.ratio(10, data_tokens=1e6) == pytest.approx(10.0)
    assert found.ratio(10, data_tokens=20) == pytest.approx(5.0)


def test_old_steps_are_forgotten_by_their_tokens() -> None:
    averages = NoiseAverages()
    for signal, steps in ((1.0, 1000), (5.0, 100)):
        for _ in range(steps):
            averages = update_averages(
                averages, NoiseSample(signal, 1.0, 10.0), half_life_tokens=100.0
            )
    assert averages.signal == pytest.approx(5 - 4 * 0.5**10, rel=1e-3)


def norms_of(parts: np.ndarray, memory: np.ndarray) -> GradientNorms:
    total = parts.sum(axis=0)
    return GradientNorms(
        micro=tuple((parts**2).sum(axis=1)),
        total=float(total @ total),
        weights=(10.0,) * len(parts),
        momentum_dot=float(total @ memory),
    )


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["free", "clipped"])
@pytest.mark.parametrize("num_micro", [1, 4])
def test_adams_average_is_compared_as_if_it_were_full_and_never_clipped(
    num_micro: int, clip: float
) -> None:
    """With a gradient that stands still tau is 1 from the first steps on, and clipping does not bend it."""
    random = np.random.default_rng(6)
    truth = np.full(DIMENSIONS, DIMENSIONS**-0.5)
    memory, averages = np.zeros(DIMENSIONS), NoiseAverages()
    for _ in range(3000):
        parts = (truth + 0.3 * random.standard_normal((num_micro, DIMENSIONS))) / num_micro
        norms = norms_of(parts, memory)
        averages = observe(averages, norms, half_life_tokens=1e6, beta1=0.9, clip=clip)
        gradient = parts.sum(axis=0)
        kept = min(1.0, clip / math.sqrt(norms.total)) if clip else 1.0
        memory = 0.9 * memory + 0.1 * kept * gradient
    found = estimate(averages)
    assert found is not None
    assert found.signal == pytest.approx(1.0, rel=0.03)
    assert found.bounce == pytest.approx(1.0, rel=0.03)


def test_a_step_before_adams_first_update_leaves_the_weighted_averages_as_they_are() -> None:
    norms = GradientNorms(
        micro=(1.0, 1.0),
        total=2.0,
        weights=(1.0, 1.0),
        preconditioned_micro=(0.0, 0.0),
        preconditioned_total=0.0,
    )
    assert observe_preconditioned(NoiseAverages(), norms, half_life_tokens=10) == NoiseAverages()


def test_weighing_squares_needs_adams_memory_from_before_the_step() -> None:
    """With the average of this step's own squares, large gradients would be divided by themselves."""
    random = np.random.default_rng(7)
    scales = np.array([0.1, 1.0, 4.0, 3.0])
    before, after, truth = NoiseAverages(), NoiseAverages(), np.array([0.05, 0.5, 2.0, 1.0])
    squares, expected = scales**2 / 4 + truth**2, []
    for _ in range(20_000):
        parts = (truth + scales * random.standard_normal((4, 4))) / 4
        gradient = parts.sum(axis=0)
        now = 0.9 * squares + 0.1 * gradient**2
        expected.append((truth**2 / np.sqrt(squares)).sum())
        for averages, weights in ((0, squares), (1, now)):
            norms = replace(
                norms_of(parts, gradient),
                preconditioned_micro=tuple((parts**2 / np.sqrt(weights)).sum(axis=1)),
                preconditioned_total=float((gradient**2 / np.sqrt(weights)).sum()),
            )
            if averages == 0:
                before = observe_preconditioned(before, norms, half_life_tokens=1e9)
            else:
                after = observe_preconditioned(after, norms, half_life_tokens=1e9)
        squares = now
    assert before.signal == pytest.approx(np.mean(expected), rel=0.06)
    assert after.signal < 0.9 * before.signal
