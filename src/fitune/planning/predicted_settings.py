"""Predicts settings of one configuration, each once, when it is asked for."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fitune.config import Recompute, RunConfig
from fitune.errors import ConfigError, ModelError, TooLongError
from fitune.language import say
from fitune.planning.candidates import describe_choice
from fitune.planning.choices import RECOMPUTES, Choice, host_choices, same_choices
from fitune.planning.forecast import Forecast, Forecaster
from fitune.planning.plan import FirstAnswer, sizes_of
from fitune.planning.pricing import Bound, Pricer
from fitune.planning.second_process import divide
from fitune.planning.several_cards import share_of


class PredictedSettings:
    """The settings of one configuration, predicted one after another (`looked_at`).

    With several cards these are the settings of one card.
    """

    def __init__(
        self,
        config: RunConfig,
        forecaster: Forecaster,
        on_stage: Callable[[str], None] | None,
        *,
        num_gpus: int = 1,
        on_first: Callable[[FirstAnswer], None] | None = None,
    ) -> None:
        # the configuration of one card, and that of all cards together
        self.config, self.whole = share_of(config, num_gpus), config
        self.forecaster, self.num_gpus = forecaster, num_gpus
        self.notify, self.on_first = on_stage or _ignore, on_first
        self.limits, self.lengths = forecaster.limits, forecaster.lengths
        on_card = self.limits.device.kind == "cuda"
        #: the settings that do not change the result; those of them that update on the host
        self.choices = list(same_choices(self.config, self.lengths, on_card=on_card))
        self.on_host = (
            host_choices(self.config.model, self.config.optim, self.choices) if on_card else []
        )
        self.pricer = Pricer(forecaster, self.choices)
        self.looked_at: dict[Choice, Forecast] = {}
        #: why settings were left out, in order, each reason once
        self.refused: dict[str, None] = {}
        self.too_long: TooLongError | None = None
        self.configured = None if self.config.batch.is_micro_open else self.choices[0]
        self.num_expected, self.skips_hopeless = 0, False

    def same_result(self) -> dict[Choice, Forecast]:
        """Return the settings predicted so far that do not change the result."""
        return {
            choice: found for choice, found in self.looked_at.items() if choice.result == "same"
        }

    def fastest(self) -> Choice | None:
        """Return the fastest setting that was predicted to fit and does not change the result."""
        same = (choice for choice, found in self.same_result().items() if found.fits)
        return min(same, key=self.order, default=None)

    def look_at(self, choices: Sequence[Choice]) -> None:
        """Predict these settings, in two processes where the machine allows it."""
        # settings that differ in their micro-batch alone share recordings: one process does them
        alike: dict[Choice, list[Choice]] = {}
        for choice in choices:
            if not self.forecaster.knows(choice):
                alike.setdefault(choice.variant, []).append(choice)

        self.num_expected = max(self.num_expected, len({*self.looked_at, *choices}))
        parts = list(alike.values())
        if len(parts) > 1:
            from fitune.model.recompute import recompute_period

            # Those that take longest are begun first: recordings of more layers, then settings
            # that share no recording with others.
            parts.sort(
                key=lambda part: (-recompute_period(part[0].recompute), part[0].result == "same")
            )
        known = divide(parts, here=self._look_at_sizes, in_copy=self._look_in_copy)
        self.forecaster.learn(known or {})
        self._look_at_hopeful(choices)

    def _look_at_sizes(self, choices: Sequence[Choice]) -> None:
        """Predict settings that differ in their micro-batch alone, in the order of its size."""
        second, *others = choices[1:-1] or choices[:1]
        # two recordings with several samples each give those of all other sizes, so they are made
        # first
        self._look_at_hopeful((second, choices[-1], *others, choices[0]))
        # Times are found last: most of them follow from the recordings that the memory was
        # predicted from.
        for choice in choices:
            if choice in self.looked_at:  # otherwise it was refused
                self.pricer.seconds(choice)

    def _look_in_copy(self, choices: Sequence[Choice]) -> dict[str, object]:
        self.notify, self.on_first = _ignore, None
        self._look_at_sizes(choices)
        return self.forecaster.known

    def _look_at_hopeful(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            if not (self.skips_hopeless and self.is_hopeless(choice)):
                self.fits(choice)

    def may_fit(self, variant: Choice) -> bool:
        """Return whether the smallest micro-batch of the variant may fit.

        Checkpointing every fourth layer saves more activations than checkpointing every second, and
        that more than checkpointing all layers. So the variant that saves fewer is predicted first.
        """
        fewer = _SAVES_FEWER.get(variant.recompute)
        recomputes = {choice.recompute for choice in self.choices}
        if fewer in recomputes and not self.may_fit(replace(variant, recompute=fewer)):
            return False
        size = self.choices[0]
        smallest = replace(variant, micro_rows=size.micro_rows, micro_tokens=size.micro_tokens)
        return not self.is_hopeless(smallest) and (
            self.fits(smallest) or not self.is_hopeless(smallest)
        )

    def is_hopeless(self, choice: Choice) -> bool:
        """Return whether an earlier prediction shows that the setting cannot fit.

        It does if the tensors alone exceed the limit, in a prediction of the same setting, of the
        same with fewer samples at once, or of the same with a chunked loss.
        """
        size = choice.micro_tokens or choice.micro_rows or 0
        for known, found in self.looked_at.items():
            is_alike = replace(known.variant, loss=choice.loss) == choice.variant
            is_smaller = (known.micro_tokens or known.micro_rows or 0) <= size
            needs_no_more = is_alike and is_smaller and known.loss in ("chunked", choice.loss)
            tensor_bytes = found.allocated_bytes + found.context_bytes
            if needs_no_more and tensor_bytes > self.limits.limit_bytes:
                return True
        return False

    def fits(self, choice: Choice) -> bool:
        """Return whether the setting fits; predict it where that is not known."""
        if choice in self.looked_at:
            return self.looked_at[choice].fits
        done = len(self.looked_at) + 1
        total = max(done, self.num_expected)
        self.notify(say("recording the step: {done} of {total}", done=done, total=total))
        with self.refusing(choice):
            self.looked_at[choice] = found = self.forecaster.forecast(choice)
            if self.on_first is not None:
                self.on_first(self.first_answer(choice, found))
                self.on_first = None
        return choice in self.looked_at and self.looked_at[choice].fits

    def first_answer(self, choice: Choice, found: Forecast) -> FirstAnswer:
        shape = self.forecaster.shape(choice, packed=found.packed)
        return FirstAnswer(
            is_configured=choice == self.configured,
            sizes=sizes_of(
                found.micro_batch,
                choice.micro_tokens,
                max(1, round(shape.num_micro_batches)),
                num_samples=self.config.batch.rows_per_step,
                is_uniform=len(set(self.lengths.sample_tokens)) == 1,
            ),
            recompute=choice.recompute,
            device_bytes=found.device_bytes,
            limit_bytes=self.limits.limit_bytes,
            fits=found.fits,
        )

    @contextmanager
    def refusing(self, choice: Choice) -> Iterator[None]:
        """Leave the setting out if predicting it in this block fails, and note why.

        An error of the first variant is raised, since that is the configuration's own. So is
        TooLongError, if no setting was predicted before.
        """
        try:
            yield
        except TooLongError as error:
            if not self.looked_at:
                raise
            self.too_long = self.too_long or error
            self.refused[f"not every setting was looked at: {self.too_long}"] = None
        except (ModelError, ConfigError) as error:
            if choice.variant == self.choices[0].variant:
                raise
            self.refused[f"{describe_choice(choice.variant)}: {error}"] = None

    def order(self, choice: Choice, *, bound: Bound | None = None) -> tuple[Any, ...]:
        """Return a sort key: fastest first, then fewest changes, then smallest micro-batch.

        Without times: fewest changes first, then the largest micro-batch.
        bound: sort by a lower bound of the time.
        """
        size = choice.micro_tokens or choice.micro_rows or 0
        seconds = self.pricer.seconds(choice, bound=bound)
        if seconds is None:
            on_host = (choice.optimizer is not None) + choice.offloads
            return math.inf, on_host, RECOMPUTES.index(choice.recompute), choice.num_changes, -size
        return seconds, 0, choice.num_changes, size, RECOMPUTES.index(choice.recompute)


#: the gradient checkpointing that saves fewer activations than the given one
_SAVES_FEWER: Mapping[Recompute, Recompute] = {"every_4": "every_2", "every_2": "full"}


def _ignore(_: str) -> None: ...
