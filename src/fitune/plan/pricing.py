"""Seconds per step of the candidates, from the operators of two sizes of each variant.

The operators of a micro-batch are affine in its tokens, so those of two recorded sizes give those of the mean
micro-batch, which is smaller than the heaviest one wherever rows differ in length.
"""

import math
from dataclasses import replace

from fitune.plan.calibration import calibration_factor
from fitune.plan.candidates import Choice
from fitune.plan.cost import SELECTIVE_LAUNCHES, Ceilings, Work, card_ceilings, mix, num_launches, seconds_of
from fitune.plan.cpu_ceilings import cpu_ceilings
from fitune.plan.forecast import Forecaster

STEP = 1.01
"""Times are told apart by one percent: no more is known, and nearer ones are ties."""
LOW_ROWS, HIGH_ROWS = 1, 4


class Pricer:
    """base: the variant that stands for the others where no recording of their own is wanted."""

    def __init__(self, forecaster: Forecaster, base: Choice) -> None:
        self._forecaster, self._base = forecaster, base.variant
        device = forecaster.limits.device
        self._ceilings: Ceilings | None = cpu_ceilings() if device.kind == "cpu" else card_ceilings(device)
        self._factor = calibration_factor(device.name, forecaster.config.model.source)

    def seconds(self, choice: Choice, *, bound: bool = False) -> float | None:
        """Of the mean step; None where the device's rates are not known. bound: a lower bound, by the base: what
        other variants do adds work."""
        if self._ceilings is None:
            return None
        variant = self._base if bound else choice.variant
        low, high = (self._forecaster.work(variant, num_rows=rows) for rows in (LOW_ROWS, HIGH_ROWS))
        shape = self._forecaster.shape(choice)
        positions = shape.positions / shape.num_micro_batches
        at = (positions - low.positions) / (high.positions - low.positions)
        attended = shape.row_tokens / self._forecaster.lengths.longest_tokens
        unsupervised = positions - shape.supervised / shape.num_micro_batches
        head = self._head(variant) if unsupervised >= 1 else ()
        base = self._forecaster.work(self._base, num_rows=LOW_ROWS) if variant.recompute == "selective" else low
        more = SELECTIVE_LAUNCHES * max(0.0, num_launches(low.later) - num_launches(base.later))
        first, later = (
            seconds_of(
                mix((1 - at, few), (at, many), (-unsupervised, head)),
                self._ceilings,
                attended=attended,
                more_launches=more,
            )
            for few, many in ((low.first, high.first), (low.later, high.later))
        )
        seconds = first + (shape.num_micro_batches - 1) * later + seconds_of(low.update, self._ceilings)
        return STEP ** round(math.log(seconds * (self._factor or 1.0), STEP))

    @property
    def assumption(self) -> str:
        """What the times rest on."""
        if self._ceilings is None:
            return "time is not predicted: the rates of this card are not known"
        how = (
            "not yet measured by a run" if self._factor is None else f"times {self._factor:.2f}, as the last run had it"
        )
        return f"time by a roofline of the recorded operators, {self._ceilings.origin}, {how}"

    def _head(self, variant: Choice) -> tuple[Work, ...]:
        """What a supervised position adds; recomputing has no part in it."""
        base = replace(self._base, loss=variant.loss)
        whole = self._forecaster.work(base, num_rows=HIGH_ROWS)
        half = self._forecaster.work(base, num_rows=HIGH_ROWS, supervised_fraction=0.5)
        return mix((2 / whole.positions, whole.later), (-2 / whole.positions, half.later))
