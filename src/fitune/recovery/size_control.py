"""Chooses the size of micro-batches during a run, from a memory model that learns from each step.

A size is the number of padded tokens of a micro-batch. Sizes have levels, each sqrt(2) times as
large as the one below; level 0 is the planned size. The bytes that a step needs, in addition to
what is allocated before it, are modelled as

    need(size) = fixed + slope * size

The line is fitted to measured peaks and to the free bytes with which a size failed, and raised
until no recent measurement lies above it. The next size is the present level if that fits in what
is free now, and a lower one otherwise. A level that failed is banned for a while, and twice as long
each time it fails again. Below the plan the size grows again as soon as memory is free. Above the
plan it grows only while tokens per second increase.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: This fraction of the free memory is never planned for, because free memory varies in a step.
MARGIN_FRACTION = 0.03
#: A larger size must be predicted to need less than this fraction of the free memory.
GROW_FRACTION = 0.9
#: steps without a failure before a larger size is tried
CLEAN_STEPS = 8
FIRST_BAN_STEPS = 64
LONGEST_BAN_STEPS = 4096
#: A ban ends early if so many times more memory is free than when the level failed.
LIFTED_FACTOR = 1.5
#: The weight of earlier measurements decays by this factor per measurement: about 20 steps count.
FORGET = 0.95
#: A level above the plan must increase tokens per second by this fraction.
LEAST_GAIN_FRACTION = 0.02
LOWEST_LEVEL = -24
#: the ratio of the sizes of neighbouring levels
LEVEL_RATIO = 2**0.5


@dataclass(frozen=True, slots=True)
class Observation:
    """What was measured in one step."""

    #: padded tokens of the largest micro-batch
    size: int
    #: the step's peak above what was allocated before it; None if it was not measured
    need_bytes: int | None = None
    tokens_per_second: float | None = None
    #: the smallest size that did not fit
    failed_size: int | None = None
    #: before the step, or when `failed_size` failed if that was less
    free_bytes: int | None = None
    #: how often the allocator had to give cached blocks back
    num_alloc_retries: int = 0


@dataclass
class _Ban:
    """A size level that is not used for a number of steps, because it failed."""

    until_step: int
    num_steps: int
    #: when the level failed
    free_bytes: int | None = None


@dataclass
class MemoryModel:
    """What is known about the memory that a step needs at each size level."""

    #: the size of level 0
    planned: int
    #: the level that is never exceeded; 0 unless the run may grow
    highest: int = 0
    #: the present level
    level: int = 0
    step: int = 0
    #: steps in a row without a failure
    clean_steps: int = 0
    #: by level
    bans: dict[int, _Ban] = field(default_factory=dict)
    #: mean tokens per second, by level
    speeds: dict[int, float] = field(default_factory=dict)
    #: decaying sums of 1, size, need, size^2 and size * need
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    #: how far the fitted line is raised
    lift_bytes: float = 0.0
    #: predicted bytes per padded token; 0 without a prediction
    prior_slope: float = 0.0
    num_changes: int = 0

    def size(self, level: int) -> int:
        return max(int(self.planned * LEVEL_RATIO**level), 1)

    def need_bytes(self, size: int) -> float | None:
        """Return the bytes that a step at this size needs, or None before anything was measured."""
        if self.sums[0] == 0:
            return None
        slope, fixed = self._line()
        return fixed + slope * size + self.lift_bytes

    def fits(self, size: int, free_bytes: int | None) -> bool:
        """Return whether a micro-batch of this size is known to fit in what is free."""
        need = self.need_bytes(size)
        return (
            need is not None
            and free_bytes is not None
            and need <= (1 - MARGIN_FRACTION) * free_bytes
        )

    def _line(self) -> tuple[float, float]:
        """Return (slope, fixed) by least squares; with one size only, use the predicted slope."""
        n, x, y, xx, xy = self.sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else self.prior_slope or y / x
        slope = max(slope, 0.0)
        return slope, (y - slope * x) / n


def memory_model(content: Mapping[str, Any]) -> MemoryModel:
    """Build the model from the dict that `dataclasses.asdict` made of it, or from its JSON."""
    # checkpoints of earlier versions have the level under the name `rung`
    renamed = {"level" if name == "rung" else name: value for name, value in content.items()}
    model = MemoryModel(**renamed)
    model.bans = {int(level): _Ban(**ban) for level, ban in content["bans"].items()}
    model.speeds = {int(level): speed for level, speed in content["speeds"].items()}
    return model


def raise_plan(model: MemoryModel, size: int) -> None:
    """Make a micro-batch that is larger than any before the plan from now on.

    What was learned about smaller sizes moves to their new levels. For training loops that are not
    fitune's, whose sizes never grow above the largest batch.
    """
    if size <= model.planned:
        return
    shift = math.ceil(math.log(size / model.planned, LEVEL_RATIO))
    model.planned = size
    model.bans = {level - shift: ban for level, ban in model.bans.items()}
    if model.level < 0:
        model.level = max(model.level - shift, LOWEST_LEVEL)


def choose_size(model: MemoryModel, free_bytes: int | None) -> int:
    """Return the largest size that a micro-batch of the next step may have."""
    before = model.level
    if (grown := _grown(model, free_bytes)) > before:
        model.level, model.clean_steps = grown, 0
    elif free_bytes is not None and not _may_fit(model, model.level, free_bytes):
        lower = range(model.level - 1, LOWEST_LEVEL - 1, -1)
        # If no size would fit, memory that does not depend on the size is the problem, and a
        # smaller size would only be slower.
        model.level = next(
            (level for level in lower if _may_fit(model, level, free_bytes)), model.level
        )
        model.clean_steps = 0
    model.num_changes += model.level != before
    return model.size(model.level)


def learn(model: MemoryModel, seen: Observation) -> None:
    """Update the model by what was measured in a step."""
    model.step += 1
    if seen.need_bytes is not None:
        # A successful step needed no more than was free, whatever the measured peak is.
        most = (
            seen.need_bytes
            if seen.free_bytes is None
            else int((1 - MARGIN_FRACTION) * seen.free_bytes)
        )
        _measure(model, seen.size, min(seen.need_bytes, most))
    before = model.level
    if seen.failed_size is not None:
        if (
            seen.free_bytes is not None
            and (model.need_bytes(seen.failed_size) or 0.0) < seen.free_bytes
        ):
            _measure(model, seen.failed_size, seen.free_bytes)  # it needs at least as much
        while model.level > LOWEST_LEVEL and model.size(model.level) >= seen.failed_size:
            _ban(model, model.level, seen.free_bytes)
            model.level -= 1
        model.clean_steps = 0
    elif seen.num_alloc_retries and model.level > LOWEST_LEVEL:
        _ban(model, model.level, None)
        model.level, model.clean_steps = model.level - 1, 0
    else:
        model.clean_steps += 1
        if seen.tokens_per_second is not None:
            _time(model, seen.tokens_per_second)
    model.num_changes += model.level != before


def _measure(model: MemoryModel, size: int, need_bytes: int) -> None:
    sample = (1.0, size, need_bytes, size * size, size * need_bytes)
    model.sums = [FORGET * total + value for total, value in zip(model.sums, sample, strict=True)]
    slope, fixed = model._line()
    model.lift_bytes = max(FORGET * model.lift_bytes, need_bytes - fixed - slope * size)


def _may_fit(model: MemoryModel, level: int, free_bytes: int) -> bool:
    need = model.need_bytes(model.size(level))
    return need is None or need <= (1 - MARGIN_FRACTION) * free_bytes


def _grown(model: MemoryModel, free_bytes: int | None) -> int:
    """Return the present level, or a higher one that may be tried in the next step.

    Below the plan it is the highest level up to the plan that fits. Above the plan it is the next
    level, as long as the last one was faster.
    """
    if model.clean_steps < CLEAN_STEPS or model.level >= model.highest:
        return model.level
    if model.level > 0 and not _gained(model):
        model.highest = model.level
        return model.level
    upper = range(min(model.highest, max(model.level + 1, 0)), model.level, -1)
    return next(
        (level for level in upper if _has_memory_for(model, level, free_bytes)), model.level
    )


def _has_memory_for(model: MemoryModel, level: int, free_bytes: int | None) -> bool:
    ban = model.bans.get(level)
    if ban is not None and model.step < ban.until_step and not _is_lifted(ban, free_bytes):
        return False
    need = model.need_bytes(model.size(level))
    if need is None or free_bytes is None:
        return level <= 0
    return need <= GROW_FRACTION * free_bytes


def _is_lifted(ban: _Ban, free_bytes: int | None) -> bool:
    """Return whether much more is free than at the failure, so that it does not count any more.

    Then another process had taken the memory, and has given it back.
    """
    return (
        ban.free_bytes is not None
        and free_bytes is not None
        and free_bytes >= LIFTED_FACTOR * ban.free_bytes
    )


def _ban(model: MemoryModel, level: int, free_bytes: int | None) -> None:
    """Ban a level, twice as long as before if it failed again soon.

    A level that succeeded for four times as long as its last ban starts with a short ban again.
    """
    last = model.bans.get(level)
    num_steps = FIRST_BAN_STEPS
    if last is not None and model.step - last.until_step < 4 * last.num_steps:
        num_steps = min(2 * last.num_steps, LONGEST_BAN_STEPS)
    model.bans[level] = _Ban(model.step + num_steps, num_steps, free_bytes)


def _time(model: MemoryModel, tokens_per_second: float) -> None:
    before = model.speeds.get(model.level, tokens_per_second)
    model.speeds[model.level] = before + (tokens_per_second - before) / CLEAN_STEPS


def _gained(model: MemoryModel) -> bool:
    """Return whether the present level is faster than the one below, if both were measured."""
    now, below = model.speeds.get(model.level), model.speeds.get(model.level - 1)
    return now is None or below is None or now >= (1 + LEAST_GAIN_FRACTION) * below
