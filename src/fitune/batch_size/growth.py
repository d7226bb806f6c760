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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fitune.batch_size.noise import NoiseEstimate
from fitune.batch_size.scaling import OptimSettings, gain, scale
from fitune.config import BatchMode

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
    """What a checkpoint holds of it. growth: the effective batch over the configured one. optim: the settings since
    the last change, None before one. changed_tokens, changed_schedule: tokens seen and the schedule's factor then."""

    growth: int = 1
    optim: OptimSettings | None = None
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

    @property
    def steps_left(self) -> float:
        """Of the batch that growing would give."""
        return (self.total_tokens - self.tokens) / (GROWTH * self.step_tokens)


@dataclass(frozen=True, slots=True)
class Change:
    """The batch doubles. lr_factor: of the rate, now. gain: what Adam's second moment is divided by. reason: one
    sentence for the person."""

    lr_factor: float
    gain: float
    reason: str


FLAT_EVALS = 4
FLAT_FRACTION = 0.002


def is_flat(eval_losses: Sequence[float]) -> bool | None:
    """Whether the held-out loss has fallen by less than a 500th over the last evaluations; None with fewer."""
    if len(eval_losses) < FLAT_EVALS:
        return None
    first, last = eval_losses[-FLAT_EVALS], eval_losses[-1]
    return last > first * (1 - FLAT_FRACTION)


def decide(mode: BatchMode, state: BatchState, now: Situation) -> Change | None:
    """None: the batch stays as it is."""
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
    """optim: what `switch_settings` gave."""
    return replace(
        state,
        growth=state.growth * GROWTH,
        optim=optim,
        changed_tokens=now.tokens,
        changed_schedule=now.schedule,
    )


def switch_settings(settings: OptimSettings, change: Change, *, steps_left: float) -> OptimSettings:
    """The optimizer's settings after the change. The rate is what the change says, not what the rule would give."""
    scaled = scale(settings, "sqrt", factor=GROWTH, steps_left=steps_left)
    return replace(
        scaled,
        lr=settings.lr * change.lr_factor,
        weight_decay=settings.weight_decay * GROWTH / change.lr_factor,
        clip=settings.clip / math.sqrt(change.gain),
    )


def set_settings(optimizer: torch.optim.Optimizer, settings: OptimSettings) -> None:
    """But for the rate, which the schedule sets. Groups without weight decay stay without."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = settings.betas
        if isinstance(group.get("eps"), float):
            group["eps"] = settings.eps
        if group["weight_decay"]:
            group["weight_decay"] = settings.weight_decay


def rescale_memory(optimizer: torch.optim.Optimizer, *, gain: float) -> None:
    """Adam goes on with its memory as the new batch would have made it: second moments are smaller by the gain, and a
    step stands for GROWTH of the old ones (arXiv 2205.10287; without the division the path jumps)."""
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].div_(gain)
        if isinstance(step := state.get("step"), torch.Tensor):
            step.div_(GROWTH)


def batch_state(content: Mapping[str, Any]) -> BatchState:
    """From what `asdict` made of it, by way of JSON."""
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
    noise = now.noise
    if (
        noise is None
        or noise.effective_steps < LEAST_EFFECTIVE_STEPS
        or now.tokens < _rested(state, now)
    ):
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
    if (
        noise is None
        or noise.effective_steps < LEAST_EFFECTIVE_STEPS
        or now.tokens < _rested(state, now)
    ):
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
