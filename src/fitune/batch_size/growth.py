"""Decides when the effective batch grows during a run, and what changes with it.

The batch never grows because of memory. Three modes of train.batch_mode let it grow, each after a
whole step and by doubling:

- anneal: whenever the schedule has halved the rate since the last change, the batch doubles and the
    rate is multiplied by sqrt(2). So the rate falls by sqrt(2) instead of 2, which gives the same
    temperature with fewer optimizer steps (Seesaw, 2025, arXiv 2510.14717).
- follow: when the noise scale is known to be far above the batch, so that twice the batch takes
    hardly more tokens. The rate grows by the square root of the gain. It takes fewer optimizer
    steps along the same path.
- hold: when training and held-out loss stand still at the noise floor, the batch doubles at a fixed
    rate. For Adam this equals dividing the rate by sqrt(2), and the message says so. It is the only
    mode that is meant to change the loss curve.

A batch that follows the noise scale would grow without limit near a minimum, where the signal
vanishes whatever the batch is. The bounce ratio, a cap, the number of steps left and a pause after
every change prevent this.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fitune.batch_size.noise import NoiseEstimate
from fitune.batch_size.scaling import OptimSettings, gain, scale
from fitune.config import BatchMode

GROWTH = 2
#: the largest batch as a multiple of the configured one
MOST_GROWTH = 16
#: A batch may be this fraction of the noise scale. It then takes a quarter more tokens than the
#: smallest batch would.
FOLLOWED_FRACTION = 0.25
LEAST_EFFECTIVE_STEPS = 20
LEAST_BOUNCE = 0.3
LEAST_STEPS_LEFT = 100
PAUSE_HALF_LIVES = 2
LAST_GROWTH_PROGRESS = 0.9


@dataclass(frozen=True, slots=True)
class BatchState:
    """How far the effective batch has grown; a checkpoint stores it."""

    #: the effective batch as a multiple of the configured one
    growth: int = 1
    #: the optimizer's settings since the last change; None before the first
    optim: OptimSettings | None = None
    #: supervised tokens seen, and the schedule's factor, at the last change
    changed_tokens: float = 0.0
    changed_schedule: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Where a run is after a step."""

    #: supervised tokens seen, and those of the whole run
    tokens: float
    total_tokens: float
    #: of the present effective batch
    step_tokens: float
    half_life_tokens: float
    warmup_fraction: float
    #: the present rate as a fraction of the peak rate, from the schedule
    schedule: float
    noise: NoiseEstimate | None
    #: whether the held-out loss stands still; None if there are too few evaluations
    flat: bool | None = None

    @property
    def progress(self) -> float:
        return self.tokens / self.total_tokens

    @property
    def steps_left(self) -> float:
        """The steps that are left for a batch of twice the size."""
        return (self.total_tokens - self.tokens) / (GROWTH * self.step_tokens)


@dataclass(frozen=True, slots=True)
class Change:
    """A doubling of the batch."""

    #: by which the rate changes now
    lr_factor: float
    #: by which Adam's second moments are divided
    gain: float
    #: a message for the user
    reason: str


FLAT_EVALS = 4
FLAT_FRACTION = 0.002


def is_flat(eval_losses: Sequence[float]) -> bool | None:
    """Return whether the held-out loss has fallen by less than a 500th over the last evaluations.

    Returns None if there are too few evaluations.
    """
    if len(eval_losses) < FLAT_EVALS:
        return None
    first, last = eval_losses[-FLAT_EVALS], eval_losses[-1]
    return last > first * (1 - FLAT_FRACTION)


def decide(mode: BatchMode, state: BatchState, now: Situation) -> Change | None:
    """Return the change that is due, or None if the batch stays as it is."""
    if mode == "advise" or state.growth * GROWTH > MOST_GROWTH:
        return None
    if now.progress < now.warmup_fraction or now.progress > LAST_GROWTH_PROGRESS:
        return None
    if now.steps_left < LEAST_STEPS_LEFT:
        return None
    match mode:
        case "anneal":
            return _anneal(state, now)
        case "follow":
            return _follow(state, now)
        case "hold":
            return _hold(state, now)


def changed(state: BatchState, now: Situation, optim: OptimSettings) -> BatchState:
    """Return the state after a change.

    optim: what `switch_settings` returned.
    """
    return replace(
        state,
        growth=state.growth * GROWTH,
        optim=optim,
        changed_tokens=now.tokens,
        changed_schedule=now.schedule,
    )


def switch_settings(settings: OptimSettings, change: Change, *, steps_left: float) -> OptimSettings:
    """Return the optimizer's settings after the change.

    The rate is the change's, which can differ from what the scaling rule `sqrt` would give.
    """
    scaled = scale(settings, "sqrt", factor=GROWTH, steps_left=steps_left)
    return replace(
        scaled,
        lr=settings.lr * change.lr_factor,
        weight_decay=settings.weight_decay * GROWTH / change.lr_factor,
        clip=settings.clip / math.sqrt(change.gain),
    )


def set_settings(optimizer: torch.optim.Optimizer, settings: OptimSettings) -> None:
    """Set all settings but the rate, which the schedule sets.

    Parameter groups without weight decay stay without.
    """
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"], group["eps"] = settings.betas, settings.eps
        if group["weight_decay"]:
            group["weight_decay"] = settings.weight_decay


def rescale_memory(optimizer: torch.optim.Optimizer, *, gain: float) -> None:
    """Change Adam's moments to what they would be if the batch had always had the new size.

    Second moments are smaller by the gain, and a step counts as GROWTH of the old ones (arXiv
    2205.10287). Without the division the weights' path jumps.
    """
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].div_(gain)
        if isinstance(step := state.get("step"), torch.Tensor):
            step.div_(GROWTH)


def batch_state(content: Mapping[str, Any]) -> BatchState:
    """Build the state from the dict that `asdict` made of it, or from its JSON."""
    optim = content["optim"]
    settings = None if optim is None else OptimSettings(**{**optim, "betas": tuple(optim["betas"])})
    return BatchState(**{**content, "optim": settings})


def _anneal(state: BatchState, now: Situation) -> Change | None:
    if now.schedule > 0.5 * state.changed_schedule:
        return None
    return Change(
        math.sqrt(GROWTH),
        float(GROWTH),
        "the schedule has halved the rate: twice the batch at a rate sqrt(2) higher",
    )


def _follow(state: BatchState, now: Situation) -> Change | None:
    noise = _settled_noise(state, now)
    if noise is None:
        return None
    if noise.bounce is None or noise.bounce <= LEAST_BOUNCE:
        return None
    if FOLLOWED_FRACTION * noise.scale_low_tokens < GROWTH * now.step_tokens:
        return None
    rho = noise.ratio(now.step_tokens)
    rho = math.inf if rho is None else rho
    gained, times = gain(rho, GROWTH), noise.scale_low_tokens / now.step_tokens
    return Change(
        math.sqrt(gained),
        gained,
        f"the noise scale is at least {noise.scale_low_tokens:,.0f} tokens, {times:.0f} times the batch: "
        f"twice the batch, rate x {math.sqrt(gained):.2f}",
    )


def _hold(state: BatchState, now: Situation) -> Change | None:
    noise = _settled_noise(state, now)
    if noise is None:
        return None
    if not now.flat or noise.bounce is None or noise.bounce > 0:
        return None
    rho = noise.ratio(now.step_tokens)
    if rho is not None and rho <= 1:
        return None
    gained = float(GROWTH) if rho is None else gain(rho, GROWTH)
    return Change(
        1.0,
        gained,
        "the loss stands still at the noise floor: twice the batch at the same rate, which equals a rate / sqrt(2)",
    )


def _settled_noise(state: BatchState, now: Situation) -> NoiseEstimate | None:
    """Return the measured noise, None before it covers enough steps or while a pause lasts.

    Each change of the batch is followed by a pause.
    """
    noise, pause = now.noise, PAUSE_HALF_LIVES * now.half_life_tokens
    if noise is None or noise.effective_steps < LEAST_EFFECTIVE_STEPS:
        return None
    return None if now.tokens < state.changed_tokens + pause else noise
