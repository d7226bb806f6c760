"""Computes the seconds per step of a plan's candidates.

The work of a micro-batch is an affine function of its tokens. So recordings of two sizes give the
work of the mean micro-batch, which is smaller than the heaviest one if samples differ in length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from fitune.config import Recompute
from fitune.errors import TooLongError
from fitune.machine.cards import Device
from fitune.planning.calibration import calibration_factor
from fitune.planning.choices import Choice
from fitune.planning.compiling import saved_launches
from fitune.planning.cost import (
    SELECTIVE_LAUNCHES,
    Ceilings,
    OpCost,
    attending,
    card_ceilings,
    mixed,
    num_launches,
    seconds_of,
    update_on_host,
)
from fitune.planning.forecast import Forecaster
from fitune.planning.plan import ADAMW_HOST
from fitune.planning.rates import cpu_ceilings, launch_seconds_here

#: times are rounded to steps of one percent: they are not more accurate, and nearer ones are ties
STEP = 1.01
#: How a lower bound of a setting's time is found. "base": from the first variant with the same
#: loss, since whatever another variant does adds work. "layers": for gradient checkpointing of a
#: part of the layers, from that part of the time that checkpointing all layers adds; for
#: offloading, from the same setting without offloading.
Bound = Literal["base", "layers"]
#: the part of the layers that is checkpointed
PARTS: Mapping[Recompute, float] = {"every_4": 0.25, "every_2": 0.5}
#: keeps the "layers" bound a lower bound: layers differ a little, and times are rounded
_SURE = 0.9
#: the most samples of the larger recorded size: fake tensors cost the same at any size, but on a
#: CPU every packed sample is an operator call
_MOST_ROWS = 4


class Pricer:
    """Predicts the time of settings.

    choices: all settings that do not change the result. The first one's variant represents the
    others in lower bounds, so that they need no recording of their own.
    """

    def __init__(self, forecaster: Forecaster, choices: Sequence[Choice]) -> None:
        self._forecaster, self._base = forecaster, choices[0].variant
        self._sizes = _two_sizes(choices, forecaster)
        device = forecaster.limits.device
        self._ceilings = _ceilings_of(device)
        self._seconds: dict[tuple[Choice, Bound | None], float | None] = {}
        self._untimed: TooLongError | None = None
        self._factor = calibration_factor(device.name, forecaster.config.model.source)

    def seconds(self, choice: Choice, *, bound: Bound | None = None) -> float | None:
        """Return the seconds of the mean step.

        Returns None if the device's rates are not known, or if recording takes too long.
        bound: return only a lower bound, which needs no recording of this setting.
        """
        key = choice, bound
        if key not in self._seconds:
            if bound == "layers":
                self._seconds[key] = self._by_layers(choice)
            else:
                base = replace(self._base, loss=choice.loss)
                try:
                    seconds = self._price(choice, base if bound else choice.variant)
                except TooLongError as error:
                    seconds, self._untimed = None, error
                # rounded before the factor is applied, so that a measured run does not change the
                # ties
                self._seconds[key] = (
                    None
                    if seconds is None
                    else (self._factor or 1.0) * STEP ** round(math.log(seconds, STEP))
                )
        return self._seconds[key]

    def with_compiled_layers(self, choice: Choice, num_layers: int) -> tuple[float, float] | None:
        """Return the seconds of the mean step, as it is and with compiled layers.

        Returns None where `seconds` does.
        """
        if self.seconds(choice) is None:
            return None
        plain = self._price(choice, choice.variant)
        compiled = self._price(choice, choice.variant, compiled_layers=num_layers)
        factor = self._factor or 1.0
        return None if plain is None or compiled is None else (factor * plain, factor * compiled)

    def _token_survey(self, variant: Choice) -> float:
        """Return the seconds of a forward without gradients, by token."""
        if self._ceilings is None or self._forecaster.config.objective != "kto":
            return 0.0
        work = self._forecaster.reference_work(variant)
        # of its own and of the mismatched answer
        return seconds_of(work.first, self._ceilings) / (2 * work.positions)

    def reference_seconds(self, choice: Choice) -> float | None:
        """Return the seconds of the pass over the training samples that computes their reference.

        Returns None if the device's rates or the data are not known, and if the reference is not
        computed before the first step.
        """
        tokens = self._forecaster.lengths.epoch_tokens
        if self._ceilings is None or tokens is None:
            return None
        if self._forecaster.config.reference != "kept":
            return None
        work = self._forecaster.reference_work(replace(choice.variant, optimizer=None))
        seconds = seconds_of(work.first, self._ceilings)
        return (self._factor or 1.0) * seconds * tokens / work.positions

    def _by_layers(self, choice: Choice) -> float | None:
        """Return the "layers" bound."""
        most = self.seconds(replace(choice, recompute="full", offloads=False))
        if choice.offloads or most is None:
            return most
        least = self.seconds(choice, bound="base")
        if least is None:
            return None
        return least + _SURE * PARTS[choice.recompute] * (most - least)

    def _price(self, choice: Choice, variant: Choice, *, compiled_layers: int = 0) -> float | None:
        """Return the seconds of the mean step of `choice`, from recordings of `variant`.

        compiled_layers: the layers that are compiled, none or all.
        """
        if self._ceilings is None:
            return None
        work = self._forecaster.work
        # forward and backward do not depend on the optimizer, so they are recorded without it
        plain = variant
        if variant.optimizer is not None:
            plain = replace(variant, optimizer=None, result="same")
        low = work(plain, tokens=self._sizes[0])
        if choice.optimizer == ADAMW_HOST:
            update = update_on_host(low.update)
        elif plain == variant:
            update = low.update
        else:
            update = work(variant, tokens=choice.micro_tokens or self._sizes[0]).update
        shape = self._forecaster.shape(choice)
        positions = shape.positions / shape.num_micro_batches
        # if all micro-batches have the smaller size, the larger one is not needed
        high = low if positions == low.positions else work(plain, tokens=self._sizes[1])
        at = 0.0 if high is low else (positions - low.positions) / (high.positions - low.positions)
        # the recordings have a target at every token, the mean micro-batch has fewer
        unsupervised = positions - shape.supervised / shape.num_micro_batches
        head = self._head(variant) if unsupervised >= 1 else ()
        is_selective = variant.recompute == "selective"
        base = work(self._base, tokens=low.positions) if is_selective else low
        more = SELECTIVE_LAUNCHES * max(0.0, num_launches(low.later) - num_launches(base.later))

        def micro_seconds(few: Sequence[OpCost], many: Sequence[OpCost]) -> float:
            few = attending(few, shape.row_tokens / low.row_tokens)
            many = attending(many, shape.row_tokens / high.row_tokens)
            assert self._ceilings is not None
            works = mixed((1 - at, few), (at, many), (-unsupervised, head))
            saved = saved_launches(works, compiled_layers) if compiled_layers else 0.0
            return seconds_of(works, self._ceilings, more_launches=more - saved)

        first, later = micro_seconds(low.first, high.first), micro_seconds(low.later, high.later)
        seconds = first + (shape.num_micro_batches - 1) * later + seconds_of(update, self._ceilings)
        # a recorded step surveys its two micro-batches before the first
        more_surveys = (
            shape.num_micro_batches - 2 if self._forecaster.config.objective == "kto" else 0
        )
        return seconds + more_surveys * positions * self._token_survey(plain)

    @property
    def assumption(self) -> str:
        """What the times assume, as a message."""
        if self._ceilings is None:
            return "time is not predicted: the rates of this card are not known"
        if self._untimed is not None:
            return f"time is not predicted of every setting: {self._untimed}"
        how = (
            "not yet measured by a run"
            if self._factor is None
            else f"times {self._factor:.2f}, as the last run had it"
        )
        return f"time by a roofline of the recorded operators, {self._ceilings.origin}, {how}"

    def _head(self, variant: Choice) -> tuple[OpCost, ...]:
        """Return the work that a target adds to a token, which is the head's and the loss's."""
        base, tokens = replace(self._base, loss=variant.loss), self._sizes[1]
        whole = self._forecaster.work(base, tokens=tokens)
        half = self._forecaster.work(base, tokens=tokens, supervised_fraction=0.5)
        return mixed((2 / tokens, whole.later), (-2 / tokens, half.later))


def _ceilings_of(device: Device) -> Ceilings | None:
    """Return the rates of the device; None for a card that is not in the catalogue."""
    if device.kind == "cpu":
        return cpu_ceilings()
    is_here = device.free_bytes is not None
    return card_ceilings(device, launch_seconds=launch_seconds_here() if is_here else None)


def _two_sizes(choices: Sequence[Choice], forecaster: Forecaster) -> tuple[int, int]:
    """Return the two sizes to record, in tokens: the longest sample, and several.

    A size whose memory is predicted is recorded in any case, if a step has two such micro-batches;
    the largest of these is preferred.
    """
    longest, rows = forecaster.lengths.longest_tokens, forecaster.config.batch.rows_per_step
    sizes = {choice.micro_tokens for choice in choices if choice.micro_tokens is not None}
    recorded = [
        size for size in sizes if 2 * longest <= size <= min(rows / 2, _MOST_ROWS) * longest
    ]
    return longest, max(recorded, default=2 * longest)
