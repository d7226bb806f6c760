"""The batch grows when it should, seldom when it should not, and never runs away."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fitune.batch_size.growth import (
    FOLLOWED_FRACTION,
    MOST_GROWTH,
    BatchState,
    Change,
    Situation,
    changed,
    decide,
    is_flat,
    rescale_memory,
    set_settings,
    switch_settings,
)
from fitune.batch_size.noise import (
    NoiseAverages,
    NoiseEstimate,
    estimate,
    pairwise_sample,
    update_averages,
)
from fitune.batch_size.scaling import OptimSettings
from fitune.config import BatchMode

NOISY = NoiseEstimate(
    signal=1.0,
    variance=1e6,
    scale_tokens=1e6,
    scale_low_tokens=8e5,
    scale_high_tokens=2e6,
    bounce=0.9,
    effective_steps=60,
)
NOW = Situation(
    tokens=3e6,
    total_tokens=1e7,
    step_tokens=1e4,
    half_life_tokens=2e5,
    warmup_fraction=0.03,
    schedule=0.8,
    noise=NOISY,
    flat=False,
)


OLD = OptimSettings(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=1.0)


def test_advise_never_changes_anything() -> None:
    assert decide("advise", BatchState(), NOW) is None


def test_follow_grows_where_the_noise_is_known_to_be_far_above_the_batch() -> None:
    change = decide("follow", BatchState(), NOW)
    assert change is not None
    assert change.gain == pytest.approx((1 + 100) / (1 + 50))
    assert change.lr_factor == pytest.approx(math.sqrt(change.gain))


@pytest.mark.parametrize(
    "now",
    [
        replace(NOW, tokens=2e5),
        replace(NOW, tokens=9.5e6),
        replace(NOW, noise=None),
        replace(NOW, noise=replace(NOISY, scale_low_tokens=7e4)),
        replace(NOW, noise=replace(NOISY, effective_steps=10)),
        replace(NOW, noise=replace(NOISY, bounce=0.1)),
        replace(NOW, noise=replace(NOISY, bounce=None)),
        replace(NOW, step_tokens=1e5),
    ],
    ids=[
        "warm-up",
        "near the end",
        "unmeasured",
        "not sure",
        "few steps",
        "bouncing",
        "no bounce",
        "few steps left",
    ],
)
def test_follow_waits(now: Situation) -> None:
    assert decide("follow", BatchState(), now) is None


def test_follow_rests_after_a_change_and_stops_at_the_cap() -> None:
    state = changed(BatchState(), replace(NOW, tokens=2.9e6), OLD)
    assert decide("follow", state, NOW) is None
    assert decide("follow", state, replace(NOW, tokens=3.4e6)) is not None
    assert decide("follow", replace(state, growth=MOST_GROWTH), replace(NOW, tokens=3.4e6)) is None


def test_anneal_doubles_each_time_the_schedule_has_halved() -> None:
    state = BatchState()
    assert decide("anneal", state, replace(NOW, schedule=0.51)) is None
    now = replace(NOW, schedule=0.5)
    change = decide("anneal", state, now)
    assert change is not None
    assert change.lr_factor == pytest.approx(math.sqrt(2))
    state = changed(state, now, OLD)
    assert state.growth == 2
    assert decide("anneal", state, replace(NOW, schedule=0.3)) is None
    assert decide("anneal", state, replace(NOW, schedule=0.25)) is not None


def test_hold_grows_at_a_plateau_on_the_noise_floor_and_keeps_the_rate() -> None:
    floor = replace(NOW, flat=True, noise=replace(NOISY, bounce=-0.2))
    change = decide("hold", BatchState(), floor)
    assert change is not None
    assert change.lr_factor == 1.0
    assert decide("hold", BatchState(), replace(floor, flat=False)) is None
    assert decide("hold", BatchState(), replace(floor, flat=None)) is None
    assert decide("hold", BatchState(), replace(floor, noise=NOISY)) is None
    quiet = replace(NOISY, bounce=0.0, scale_tokens=5e3)
    assert decide("hold", BatchState(), replace(floor, noise=quiet)) is None


def test_a_switch_rescales_adams_memory_and_settings() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW(
        [weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
    )
    for _ in range(10):
        weight.grad = torch.full((3,), 0.1)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    new = switch_settings(OLD, Change(1.4, 1.96, ""), steps_left=1000)
    set_settings(optimizer, new)
    rescale_memory(optimizer, gain=1.96)
    assert torch.allclose(optimizer.state[weight]["exp_avg_sq"], before["exp_avg_sq"] / 1.96)
    assert torch.equal(optimizer.state[weight]["exp_avg"], before["exp_avg"])
    assert float(optimizer.state[weight]["step"]) == 5
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.9, pytest.approx(0.999**2))
    assert group["weight_decay"] * new.lr / 2 == pytest.approx(0.01 * OLD.lr)
    assert new.lr == pytest.approx(1.4e-3)
    assert new.clip == pytest.approx(1 / 1.4)


def test_a_loss_stands_still_when_it_has_hardly_fallen_over_four_evaluations() -> None:
    assert is_flat([2.0, 1.9, 1.8]) is None
    assert is_flat([3.0, 2.0, 1.9, 1.8, 1.7]) is False
    assert is_flat([3.0, 1.7, 1.7, 1.699, 1.698]) is True


DIMENSIONS, MICRO, STEPS, TOTAL = 32, 4, 2000, 1.0e6


def simulate(
    mode: BatchMode,
    ratio_at: np.ndarray,
    *,
    seed: int,
    heavy: bool = False,
    bounce: float = 0.9,
    window: float = 0.02,
    look: Callable[[NoiseAverages], NoiseEstimate | None] = estimate,
) -> list[float]:
    """The shares of the run at which the batch grew. ratio_at: the noise scale over the configured batch, for each
    hundredth of the run. The gradient has a signal of 1 and noise of that scale, of heavy tails if asked. window:
    the half-life as a share of the run. look: what the mode is told of the averages."""
    random = np.random.default_rng(seed)
    step_tokens, half_life = TOTAL / STEPS, TOTAL * window
    state, averages, tokens, grown = BatchState(), NoiseAverages(), 0.0, []
    truth = np.full(DIMENSIONS, DIMENSIONS**-0.5)
    while tokens < TOTAL:
        size = state.growth * step_tokens
        ratio = ratio_at[min(int(100 * tokens / TOTAL), 99)] * step_tokens / size
        shape = (MICRO, DIMENSIONS)
        noise = (
            random.standard_t(5, shape) / math.sqrt(5 / 3)
            if heavy
            else random.standard_normal(shape)
        )
        parts = (truth + noise * math.sqrt(ratio * MICRO / DIMENSIONS)) / MICRO
        total = float((parts.sum(axis=0) ** 2).sum())
        sample = pairwise_sample(
            (parts**2).sum(axis=1).tolist(), total, weights=[size / MICRO] * MICRO
        )
        assert sample is not None
        averages = update_averages(averages, sample, half_life_tokens=half_life, dot=bounce)
        tokens += size
        now = Situation(
            tokens=tokens,
            total_tokens=TOTAL,
            step_tokens=size,
            half_life_tokens=half_life,
            warmup_fraction=0.03,
            schedule=1.0,
            noise=look(averages),
        )
        if decide(mode, state, now) is not None:
            state = changed(state, now, OLD)
            grown.append(tokens / TOTAL)
    return grown


def constant(ratio: float) -> np.ndarray:
    return np.full(100, ratio)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_the_batch_grows_falsely_in_at_most_a_twentieth_of_the_runs(heavy: bool) -> None:
    """The noise scale sits where growing would just be right at twice the value: any growth is false."""
    false = sum(
        bool(simulate("follow", constant(1 / FOLLOWED_FRACTION), seed=s, heavy=heavy))
        for s in range(30)
    )
    assert false <= 0.05 * 30


def test_a_short_window_without_bounds_would_grow_falsely() -> None:
    def naive(averages: NoiseAverages) -> NoiseEstimate | None:
        found = estimate(averages)
        if found is None:
            return None
        scale = math.inf if found.scale_tokens is None else found.scale_tokens
        return replace(found, scale_low_tokens=scale, effective_steps=STEPS, bounce=0.9)

    ratio = constant(1 / FOLLOWED_FRACTION)
    runs = [
        simulate("follow", ratio, seed=seed, heavy=True, window=0.002, look=naive)
        for seed in range(10)
    ]
    assert sum(map(bool, runs)) > 0.3 * 10


def test_a_step_of_the_noise_scale_is_followed_soon_and_without_flapping() -> None:
    ratios = np.where(np.arange(100) < 40, 1.0, 12.0) / FOLLOWED_FRACTION
    for seed in range(8):
        grown = simulate("follow", ratios, seed=seed)
        assert grown, seed
        assert 0.40 < grown[0] < 0.52
        assert len(grown) <= 3


def test_around_a_minimum_where_the_noise_scale_is_without_limit_nothing_grows() -> None:
    for seed in range(5):
        assert not simulate("follow", constant(1000.0), seed=seed, bounce=0.0)
    assert simulate("follow", constant(1000.0), seed=0, bounce=0.9)
