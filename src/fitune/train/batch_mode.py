"""When the effective batch grows by itself, and what changes with it.

Growing is never a matter of memory. Three modes do it on request, each at a commit and each by doubling:

- anneal: whenever the schedule has halved the rate since the last change, the batch doubles and the rate gets back a
  factor of sqrt(2), so that it falls by sqrt(2) instead of 2: the same temperature with fewer optimizer steps
  (Seesaw, 2025, arXiv 2510.14717).
- follow: when the noise scale is known to be far above the batch, so that a batch twice as large costs next to no
  tokens. The rate grows by the square root of the gain. Fewer optimizer steps, the same path.
- hold: when training and held-out loss stand still at the noise floor, the batch doubles at a fixed rate. For Adam that
  is a rate divided by sqrt(2), and it is said so. The only mode that means to change the loss curve.

A batch that chases the noise scale would run away near a minimum, where the signal vanishes whatever the batch: the
bounce ratio, a cap, the number of steps left and a pause after every change stand against it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fitune.step.scaling import Settings, gain, scale
from fitune.train.noise import NoiseEstimate

BatchMode = Literal["advise", "anneal", "follow", "hold"]
GROWTH = 2
MOST_GROWTH = 16
"""Times the configured batch, over all changes."""
FOLLOWED_FRACTION = 0.25
"""A batch may be this share of the noise scale: it then needs a quarter more tokens than the smallest one would."""
LEAST_EFFECTIVE_STEPS = 20
LEAST_BOUNCE = 0.3
LEAST_STEPS_LEFT = 100
PAUSE_HALF_LIVES = 2
LAST_GROWTH_PROGRESS = 0.9


@dataclass(frozen=True, slots=True)
class BatchState:
    """What a checkpoint holds of it. growth: the effective batch over the configured one. lr_factor: on top of the
    schedule. changed_tokens, changed_schedule: tokens seen and the schedule's factor at the last change."""

    growth: int = 1
    lr_factor: float = 1.0
    changed_tokens: float = 0.0
    changed_schedule: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """At a commit. step_tokens: of an effective batch now. schedule: the share of the peak rate in use. flat: whether
    training and held-out loss stand still; None where there is too little to tell."""

    tokens: float
    total_tokens: float
    step_tokens: float
    half_life_tokens: float
    warmup_fraction: float
    schedule: float
    noise: NoiseEstimate | None
    flat: bool | None = None

    @property
    def progress(self) -> float:
        return self.tokens / self.total_tokens


@dataclass(frozen=True, slots=True)
class Change:
    """The batch doubles. lr_factor: of the rate, now. gain: what Adam's second moment is divided by. reason: one
    sentence for the person."""

    lr_factor: float
    gain: float
    reason: str


def decide(mode: BatchMode, state: BatchState, now: Situation) -> Change | None:
    """None: the batch stays as it is."""
    if mode == "advise" or state.growth * GROWTH > MOST_GROWTH:
        return None
    steps_left = (now.total_tokens - now.tokens) / (GROWTH * now.step_tokens)
    if now.progress < now.warmup_fraction or now.progress > LAST_GROWTH_PROGRESS or steps_left < LEAST_STEPS_LEFT:
        return None
    match mode:
        case "anneal":
            return _anneal(state, now)
        case "follow":
            return _follow(state, now)
        case "hold":
            return _hold(state, now)


def changed(state: BatchState, change: Change, now: Situation) -> BatchState:
    return replace(
        state,
        growth=state.growth * GROWTH,
        lr_factor=state.lr_factor * change.lr_factor,
        changed_tokens=now.tokens,
        changed_schedule=now.schedule,
    )


def switch_settings(settings: Settings, change: Change, *, rho: float, steps_left: float) -> Settings:
    """The optimizer's settings after the change. The rate is what the change says, not what the rule would give."""
    scaled = scale(settings, "sqrt_gain", factor=GROWTH, rho=rho, steps_left=steps_left)
    rate = settings.lr * change.lr_factor
    return replace(scaled, lr=rate, weight_decay=settings.weight_decay * GROWTH / change.lr_factor)


def switch_optimizer(optimizer: torch.optim.Optimizer, old: Settings, new: Settings, *, gain: float) -> None:
    """Adam goes on with its memory as the new batch would have made it: second moments are smaller by the gain, and a
    step stands for GROWTH of the old ones (arXiv 2205.10287; without the division the path jumps)."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = new.betas
        if "eps" in group and isinstance(group["eps"], float):
            group["eps"] = new.eps
        if old.weight_decay:
            group["weight_decay"] *= new.weight_decay / old.weight_decay
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].div_(gain)
        if isinstance(step := state.get("step"), torch.Tensor):
            step.div_(GROWTH)


def state_from(content: Mapping[str, Any]) -> BatchState:
    return BatchState(**content)


def _anneal(state: BatchState, now: Situation) -> Change | None:
    if now.schedule > 0.5 * state.changed_schedule:
        return None
    return Change(
        math.sqrt(GROWTH), float(GROWTH), "the schedule has halved the rate: twice the batch at a rate sqrt(2) higher"
    )


def _follow(state: BatchState, now: Situation) -> Change | None:
    noise = now.noise
    if noise is None or noise.effective_steps < LEAST_EFFECTIVE_STEPS or now.tokens < _rested(state, now):
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
    noise = now.noise
    if noise is None or noise.effective_steps < LEAST_EFFECTIVE_STEPS or now.tokens < _rested(state, now):
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


def _rested(state: BatchState, now: Situation) -> float:
    return state.changed_tokens + PAUSE_HALF_LIVES * now.half_life_tokens
