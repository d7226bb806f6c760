"""Seconds per step of the candidates, from the operators of two sizes of each variant.

The operators of a micro-batch are affine in its tokens, so those of two recorded sizes give those of the mean
micro-batch, which is smaller than the heaviest one wherever rows differ in length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from fitune.config import Recompute
from fitune.errors import TooLongError
from fitune.planning.calibration import calibration_factor
from fitune.planning.choices import Choice
from fitune.planning.cost import (
    SELECTIVE_LAUNCHES,
    Ceilings,
    OpCost,
    attending,
    card_ceilings,
    hosted,
    mixed,
    num_launches,
    seconds_of,
)
from fitune.planning.forecast import Forecaster
from fitune.planning.plan import ADAMW_HOST
from fitune.planning.rates import cpu_ceilings

STEP = 1.01
"""Times are told apart by one percent: no more is known, and nearer ones are ties."""
Bound = Literal["base", "layers"]
"""base: by the base with the same loss, as whatever another variant does adds work. layers: of a variant that
recomputes a part of the layers by that part of what recomputing all of them adds; of one that offloads by what does
not."""
PARTS: Mapping[Recompute, float] = {"every_4": 0.25, "every_2": 0.5}
_SURE = 0.9
"""Layers differ a little, and times are rounded to a percent."""
_MOST_ROWS = 4
"""Of the larger size: fake tensors cost the same at any size, but a packed row is an operator call on a CPU."""


class Pricer:
    """choices: all that leave the result the same; the first one's variant stands for the others where no recording of
    their own is wanted."""

    def __init__(self, forecaster: Forecaster, choices: Sequence[Choice]) -> None:
        self._forecaster, self._base = forecaster, choices[0].variant
        self._sizes = _two_sizes(choices, forecaster)
        device = forecaster.limits.device
        self._ceilings: Ceilings | None = cpu_ceilings() if device.kind == "cpu" else card_ceilings(device)
        self._seconds: dict[tuple[Choice, Bound | None], float | None] = {}
        self._untimed: TooLongError | None = None
        self._factor = calibration_factor(device.name, forecaster.config.model.source)

    def seconds(self, choice: Choice, *, bound: Bound | None = None) -> float | None:
        """Of the mean step; None where the device's rates are not known, or recording takes too long. bound: only a
        lower bound, which needs no recording of its own."""
        key = choice, bound
        if key not in self._seconds:
            if bound == "layers":
                self._seconds[key] = self._by_layers(choice)
            else:
                base = replace(self._base, loss=choice.loss)
                try:
                    self._seconds[key] = self._price(choice, base if bound else choice.variant)
                except TooLongError as error:
                    self._seconds[key], self._untimed = None, error
        return self._seconds[key]

    def _by_layers(self, choice: Choice) -> float | None:
        most = self.seconds(replace(choice, recompute="full", offloads=False))
        if choice.offloads or most is None:
            return most
        least = self.seconds(choice, bound="base")
        if least is None:
            return None
        return least + _SURE * PARTS[choice.recompute] * (most - least)

    def _price(self, choice: Choice, variant: Choice) -> float | None:
        if self._ceilings is None:
            return None
        kin = variant if variant.optimizer is None else replace(variant, optimizer=None, result="same")
        low = self._forecaster.work(kin, tokens=self._sizes[0])
        if choice.optimizer == ADAMW_HOST:
            update = hosted(low.update)
        elif kin == variant:
            update = low.update
        else:
            update = self._forecaster.work(variant, tokens=choice.micro_tokens or self._sizes[0]).update
        shape = self._forecaster.shape(choice)
        positions = shape.positions / shape.num_micro_batches
        # where all micro-batches are of one long row another size tells nothing more
        high = low if positions == low.positions else self._forecaster.work(kin, tokens=self._sizes[1])
        at = 0.0 if high is low else (positions - low.positions) / (high.positions - low.positions)
        unsupervised = positions - shape.supervised / shape.num_micro_batches
        head = self._head(variant) if unsupervised >= 1 else ()
        base = self._forecaster.work(self._base, tokens=low.positions) if variant.recompute == "selective" else low
        more = SELECTIVE_LAUNCHES * max(0.0, num_launches(low.later) - num_launches(base.later))

        def micro_seconds(few: Sequence[OpCost], many: Sequence[OpCost]) -> float:
            few, many = (
                attending(work, shape.row_tokens / size.row_tokens) for work, size in ((few, low), (many, high))
            )
            assert self._ceilings is not None
            return seconds_of(
                mixed((1 - at, few), (at, many), (-unsupervised, head)), self._ceilings, more_launches=more
            )

        first, later = micro_seconds(low.first, high.first), micro_seconds(low.later, high.later)
        seconds = first + (shape.num_micro_batches - 1) * later + seconds_of(update, self._ceilings)
        return (self._factor or 1.0) * STEP ** round(math.log(seconds, STEP))  # a run must not move the ties

    @property
    def assumption(self) -> str:
        """What the times rest on."""
        if self._ceilings is None:
            return "time is not predicted: the rates of this card are not known"
        if self._untimed is not None:
            return f"time is not predicted of every setting: {self._untimed}"
        how = (
            "not yet measured by a run" if self._factor is None else f"times {self._factor:.2f}, as the last run had it"
        )
        return f"time by a roofline of the recorded operators, {self._ceilings.origin}, {how}"

    def _head(self, variant: Choice) -> tuple[OpCost, ...]:
        """What a supervised position adds; recomputing has no part in it."""
        base, tokens = replace(self._base, loss=variant.loss), self._sizes[1]
        whole = self._forecaster.work(base, tokens=tokens)
        half = self._forecaster.work(base, tokens=tokens, supervised_fraction=0.5)
        return mixed((2 / tokens, whole.later), (-2 / tokens, half.later))


def _two_sizes(choices: Sequence[Choice], forecaster: Forecaster) -> tuple[int, int]:
    """Tokens: the longest row, and several. Sizes that the memory is predicted for are recorded anyway, if a step has
    two such micro-batches."""
    longest, rows = forecaster.lengths.longest_tokens, forecaster.config.batch.rows_per_step
    sizes = {choice.micro_tokens for choice in choices if choice.micro_tokens is not None}
    recorded = [size for size in sizes if 2 * longest <= size <= min(rows / 2, _MOST_ROWS) * longest]
    return longest, max(recorded, default=2 * longest)
