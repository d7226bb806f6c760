"""One gain gives every setting of the optimizer for another batch."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.batch_size.scaling import OptimSettings, configured_lr, gain, rate_factor, scale
from fitune.config import OptimConfig

REFERENCE = OptimSettings(lr=3e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=1.0)


@given(st.floats(0, 1e6), st.floats(1, 256))
def test_the_gain_lies_between_one_and_the_factor(rho: float, factor: float) -> None:
    assert 1 - 1e-9 <= gain(rho, factor) <= factor * (1 + 1e-9)


@given(st.floats(0, 1e3), st.floats(1.1, 16), st.floats(1.1, 16))
def test_two_steps_of_growth_are_one(rho: float, first: float, second: float) -> None:
    together = gain(rho, first * second)
    assert gain(rho, first) * gain(rho / first, second) == pytest.approx(together)


@given(st.floats(0, 1e3), st.floats(1, 64))
def test_growing_and_shrinking_back_changes_nothing(rho: float, factor: float) -> None:
    grown = scale(REFERENCE, "sqrt_gain", factor=factor, rho=rho)
    back = scale(grown, "sqrt_gain", factor=1 / factor, rho=rho / factor)
    assert (back.lr, back.betas[1], back.eps, back.weight_decay, back.clip) == pytest.approx(
        (3e-5, 0.999, 1e-8, 0.01, 1.0)
    )


@pytest.mark.parametrize(
    ("scale_rows", "lr"), [(12, 4.2e-5), (24, 4.7e-5), (100, 5.5e-5), (400, 5.9e-5)]
)
def test_four_times_six_rows_gets_the_rate_that_the_noise_allows(
    scale_rows: int, lr: float
) -> None:
    assert scale(REFERENCE, "sqrt_gain", factor=4, rho=scale_rows / 6).lr == pytest.approx(
        lr, rel=0.012
    )


def test_without_a_measurement_the_rate_at_most_doubles() -> None:
    assert rate_factor("sqrt_gain", 3, rho=None) == pytest.approx(math.sqrt(3))
    assert rate_factor("sqrt_gain", 64, rho=None) == 2
    assert rate_factor("sqrt_gain", 1 / 64, rho=None) == 0.5
    assert scale(REFERENCE, "sqrt_gain", factor=64).clip == pytest.approx(0.5)


def test_what_remembers_and_shrinks_keeps_its_length_in_tokens() -> None:
    scaled = scale(REFERENCE, "sqrt", factor=4)
    assert scaled.lr == pytest.approx(6e-5)
    assert scaled.betas[1] ** (1 / 4) == pytest.approx(0.999)
    assert scaled.lr * scaled.weight_decay / 4 == pytest.approx(3e-5 * 0.01)
    assert scaled.eps == pytest.approx(5e-9)
    assert scaled.clip == pytest.approx(0.5)


def test_a_published_pair_of_beta2_follows() -> None:
    """0.95 at a batch of 16 and 0.997 at 1 (Marek et al. 2025, arXiv 2507.07101)."""
    reference = OptimSettings(lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=0.0)
    assert scale(reference, "sqrt", factor=1 / 16).betas[1] == pytest.approx(0.9968, abs=5e-5)


def test_beta1_stays_unless_it_averages_over_too_many_of_the_steps_left() -> None:
    assert scale(REFERENCE, "sqrt", factor=4, steps_left=1000).betas[0] == 0.9
    assert scale(REFERENCE, "sqrt", factor=4, steps_left=100).betas[0] == pytest.approx(0.9**4)


def test_no_rule_and_no_change_leave_everything() -> None:
    assert scale(REFERENCE, "none", factor=4) == REFERENCE
    assert scale(REFERENCE, "sqrt", factor=1) == REFERENCE


RUNS, CURVATURES = 1500, np.geomspace(0.05, 1.0, 8)
NOISE, DECAY, STEPS = 300.0, 2.5, 3200
BASE = OptimSettings(lr=3e-2, betas=(0.9, 0.998), eps=1e-12, weight_decay=0.0, clip=0.0)


@dataclass(frozen=True)
class Switch:
    """After `step` steps the batch grows by `factor`: `settings` from there on, and Adam's memory divided by `gain`."""

    step: int
    factor: int
    settings: OptimSettings
    gain: float


def adam_on_a_quadratic(
    settings: OptimSettings, factor: int, *, seed: int, switch: Switch | None = None
) -> np.ndarray:
    """The loss, mean over runs, after each step; STEPS steps of one sample, or the same samples in larger batches. The
    noise falls over the run, as it does in training, so that what is remembered too long or too briefly shows."""
    random = np.random.default_rng(seed)
    weights = np.full((RUNS, len(CURVATURES)), 3.0)
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    losses, samples, step, taken = [], 0, 0.0, 0
    while samples < STEPS:
        if switch is not None and taken == switch.step:
            settings, factor = switch.settings, switch.factor
            v, step = v / switch.gain, step / switch.factor
        samples, step, taken = samples + factor, step + 1, taken + 1
        deviation = NOISE * math.exp(-DECAY * samples / STEPS) / math.sqrt(factor)
        gradient = CURVATURES * weights + deviation * random.standard_normal(weights.shape)
        beta1, beta2 = settings.betas
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + settings.eps)
        weights = weights - settings.lr * update
        losses.append((CURVATURES * weights**2).sum(axis=1).mean() / 2)
    return np.array(losses)


@pytest.fixture(scope="module")
def path() -> np.ndarray:
    return adam_on_a_quadratic(BASE, 1, seed=1)


@pytest.mark.parametrize(("factor", "most"), [(4, 0.01), (16, 0.02), (64, 0.06)])
def test_the_whole_rule_keeps_the_path_of_a_noisy_run_and_the_rate_alone_does_not(
    path: np.ndarray, factor: int, most: float
) -> None:
    """In the limit of noise (rho -> inf) and at equal samples (Malladi et al. 2022, arXiv 2205.10287)."""

    def deviation(settings: OptimSettings) -> float:
        other = adam_on_a_quadratic(settings, factor, seed=2)
        return float(np.abs(other / path[factor - 1 :: factor] - 1)[-len(other) // 8 :].mean())

    whole = scale(BASE, "sqrt", factor=factor, steps_left=1)
    assert deviation(whole) <= most
    assert deviation(replace(BASE, lr=whole.lr)) > 0.15
    assert deviation(BASE) > 0.15


def test_a_switch_in_the_middle_keeps_the_path_only_with_adams_memory_rescaled(
    path: np.ndarray,
) -> None:
    factor, at = 16, STEPS // 2
    whole = scale(BASE, "sqrt", factor=factor, steps_left=1)

    def deviation(switch: Switch) -> float:
        other = adam_on_a_quadratic(BASE, 1, seed=2, switch=switch)[at:]
        return float(np.abs(other / path[at + factor - 1 :: factor] - 1).max())

    assert deviation(Switch(at, factor, whole, gain=factor)) <= 0.02
    assert deviation(Switch(at, factor, whole, gain=1.0)) > 0.05
    assert deviation(Switch(at, factor, BASE, gain=1.0)) > 0.05


def test_where_there_is_no_noise_the_square_root_is_too_slow_and_the_gain_says_so() -> None:
    """The regime gate: with rho far below 1 a larger batch carries no more signal, so its rate is not raised."""
    assert rate_factor("sqrt_gain", 16, rho=0.04) == pytest.approx(1.02, abs=0.005)
    assert rate_factor("sqrt", 16, rho=0.04) == 4


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_rate_of_preferences_is_a_twentieth_where_none_is_given(method: str) -> None:
    of_sft, of_dpo = (configured_lr(OptimConfig(), method, name) for name in ("sft", "dpo"))  # type: ignore[arg-type]
    assert of_dpo == pytest.approx(of_sft / 20)
    assert configured_lr(OptimConfig(lr=3e-6), "lora", "dpo") == 3e-6
