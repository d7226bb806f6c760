"""How large micro-batches are while a run goes on: the memory model, and what it learns from each step.

A size is the number of positions (tokens with padding) of a micro-batch. Sizes form a ladder of rungs, a factor of the
root of 2 apart; rung 0 is what was planned. What a step needs above what is held before it is taken as

    need(size) = fixed + slope * size

fitted to measured peaks, and to what was free where a size failed, and lifted until no recent one lies above it. The
next size is the present rung if that fits in what is free now, a lower one if not. A rung that failed is banned for a
while; each time that it fails again the ban is twice as long. Below the plan the way back up is taken when memory is
there; above it only while tokens per second gain.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MARGIN_FRACTION = 0.03
"""Of the free memory, never planned for: what else moves in a step."""
GROW_FRACTION = 0.9
"""A larger size must be predicted to need less than this share of the free memory."""
CLEAN_STEPS = 8
"""Steps without a failure before a larger size is tried."""
FIRST_BAN_STEPS = 64
LONGEST_BAN_STEPS = 4096
LIFTED_FACTOR = 1.5
"""A ban ends early when so many times the memory is free as when the rung failed."""
FORGET = 0.95
"""Weight of the earlier measurements at each new one: about 20 steps count."""
LEAST_GAIN_FRACTION = 0.02
"""Of tokens per second, for which a rung above the plan is worth its memory."""
LOWEST_RUNG = -24
RUNG = 2**0.5


@dataclass(frozen=True, slots=True)
class Observation:
    """One step. size: its largest micro-batch. need_bytes: the step's peak above what was held before it, None where
    it was not measured. failed_size: the smallest that did not fit, None where all did. free_bytes: before the step,
    or for the step when that size failed, if that was less. num_alloc_retries: how often the allocator had to give
    cached blocks back."""

    size: int
    need_bytes: int | None = None
    tokens_per_second: float | None = None
    failed_size: int | None = None
    free_bytes: int | None = None
    num_alloc_retries: int = 0


@dataclass
class _Ban:
    """free_bytes: when it failed."""

    until_step: int
    num_steps: int
    free_bytes: int | None = None


@dataclass
class MemoryModel:
    """planned: the size of rung 0. highest: the rung that is never exceeded, 0 unless the run may grow. prior_slope:
    predicted bytes per position, 0 where there is no prediction. The rest is learned."""

    planned: int
    highest: int = 0
    rung: int = 0
    step: int = 0
    clean_steps: int = 0
    bans: dict[int, _Ban] = field(default_factory=dict)
    speeds: dict[int, float] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    lift_bytes: float = 0.0
    prior_slope: float = 0.0
    num_changes: int = 0

    def size(self, rung: int) -> int:
        return max(int(self.planned * RUNG**rung), 1)

    def need_bytes(self, size: int) -> float | None:
        """None before anything was measured."""
        if self.sums[0] == 0:
            return None
        slope, fixed = self._line()
        return fixed + slope * size + self.lift_bytes

    def fits(self, size: int, free_bytes: int | None) -> bool:
        """Whether a micro-batch of this size is known to fit in what is free."""
        need = self.need_bytes(size)
        return (
            need is not None
            and free_bytes is not None
            and need <= (1 - MARGIN_FRACTION) * free_bytes
        )

    def _line(self) -> tuple[float, float]:
        """(slope, fixed) by least squares; through one size alone, with the slope that was predicted."""
        n, x, y, xx, xy = self.sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else self.prior_slope or y / x
        slope = max(slope, 0.0)
        return slope, (y - slope * x) / n


def memory_model(content: Mapping[str, Any]) -> MemoryModel:
    """What `dataclasses.asdict` made of one, also by way of JSON, whose keys are text."""
    model = MemoryModel(**content)
    model.bans = {int(rung): _Ban(**ban) for rung, ban in content["bans"].items()}
    model.speeds = {int(rung): speed for rung, speed in content["speeds"].items()}
    return model


def raise_plan(model: MemoryModel, size: int) -> None:
    """A micro-batch larger than any before is the plan from now on; what was learned of smaller sizes stays, to a rung.
    For batches that come from elsewhere, above whose size nothing grows."""
    if size <= model.planned:
        return
    shift = math.ceil(math.log(size / model.planned, RUNG))
    model.planned = size
    model.bans = {rung - shift: ban for rung, ban in model.bans.items()}
    if model.rung < 0:
        model.rung = max(model.rung - shift, LOWEST_RUNG)


def choose_size(model: MemoryModel, free_bytes: int | None) -> int:
    """The largest size that a micro-batch of the next step may have."""
    before = model.rung
    if (grown := _grown(model, free_bytes)) > before:
        model.rung, model.clean_steps = grown, 0
    elif free_bytes is not None and not _may_fit(model, model.rung, free_bytes):
        lower = range(model.rung - 1, LOWEST_RUNG - 1, -1)
        # where no size would fit, what is held regardless of the size is the matter, and a smaller one is only slower
        model.rung = next((rung for rung in lower if _may_fit(model, rung, free_bytes)), model.rung)
        model.clean_steps = 0
    model.num_changes += model.rung != before
    return model.size(model.rung)


def learn(model: MemoryModel, seen: Observation) -> None:
    """Take in what a step showed."""
    model.step += 1
    if seen.need_bytes is not None:
        # a step that went well needed no more than was free, whatever the peak seems to say
        most = (
            seen.need_bytes
            if seen.free_bytes is None
            else int((1 - MARGIN_FRACTION) * seen.free_bytes)
        )
        _measure(model, seen.size, min(seen.need_bytes, most))
    before = model.rung
    if seen.failed_size is not None:
        if (
            seen.free_bytes is not None
            and (model.need_bytes(seen.failed_size) or 0.0) < seen.free_bytes
        ):
            _measure(model, seen.failed_size, seen.free_bytes)  # it needs at least that
        while model.rung > LOWEST_RUNG and model.size(model.rung) >= seen.failed_size:
            _ban(model, model.rung, seen.free_bytes)
            model.rung -= 1
        model.clean_steps = 0
    elif seen.num_alloc_retries and model.rung > LOWEST_RUNG:
        _ban(model, model.rung, None)
        model.rung, model.clean_steps = model.rung - 1, 0
    else:
        model.clean_steps += 1
        if seen.tokens_per_second is not None:
            _time(model, seen.tokens_per_second)
    model.num_changes += model.rung != before


def _measure(model: MemoryModel, size: int, need_bytes: int) -> None:
    sample = (1.0, size, need_bytes, size * size, size * need_bytes)
    model.sums = [FORGET * total + value for total, value in zip(model.sums, sample, strict=True)]
    slope, fixed = model._line()
    model.lift_bytes = max(FORGET * model.lift_bytes, need_bytes - fixed - slope * size)


def _may_fit(model: MemoryModel, rung: int, free_bytes: int) -> bool:
    need = model.need_bytes(model.size(rung))
    return need is None or need <= (1 - MARGIN_FRACTION) * free_bytes


def _grown(model: MemoryModel, free_bytes: int | None) -> int:
    """Below the plan the highest rung up to it that fits; above it the next one, while the last one was a gain."""
    if model.clean_steps < CLEAN_STEPS or model.rung >= model.highest:
        return model.rung
    if model.rung > 0 and not _gained(model):
        model.highest = model.rung
        return model.rung
    upper = range(min(model.highest, max(model.rung + 1, 0)), model.rung, -1)
    return next((rung for rung in upper if _has_room(model, rung, free_bytes)), model.rung)


def _has_room(model: MemoryModel, rung: int, free_bytes: int | None) -> bool:
    ban = model.bans.get(rung)
    if ban is not None and model.step < ban.until_step and not _is_lifted(ban, free_bytes):
        return False
    need = model.need_bytes(model.size(rung))
    if need is None or free_bytes is None:
        return rung <= 0
    return need <= GROW_FRACTION * free_bytes


def _is_lifted(ban: _Ban, free_bytes: int | None) -> bool:
    """What another process had taken is given back: its failure says nothing of what is free now."""
    return (
        ban.free_bytes is not None
        and free_bytes is not None
        and free_bytes >= LIFTED_FACTOR * ban.free_bytes
    )


def _ban(model: MemoryModel, rung: int, free_bytes: int | None) -> None:
    """A rung that held out for four times its last ban starts again with a short one."""
    last = model.bans.get(rung)
    num_steps = FIRST_BAN_STEPS
    if last is not None and model.step - last.until_step < 4 * last.num_steps:
        num_steps = min(2 * last.num_steps, LONGEST_BAN_STEPS)
    model.bans[rung] = _Ban(model.step + num_steps, num_steps, free_bytes)


def _time(model: MemoryModel, tokens_per_second: float) -> None:
    before = model.speeds.get(model.rung, tokens_per_second)
    model.speeds[model.rung] = before + (tokens_per_second - before) / CLEAN_STEPS


def _gained(model: MemoryModel) -> bool:
    """Whether the present rung is faster than the one below, as far as both were seen."""
    now, below = model.speeds.get(model.rung), model.speeds.get(model.rung - 1)
    return now is None or below is None or now >= (1 + LEAST_GAIN_FRACTION) * below
