"""Chooses the setting of a run: the fastest one that fits and does not change the training result.

The memory of every candidate is predicted by replaying its allocations against the limit, its time
by a roofline. Among settings of equal time, the one with the fewest changes is chosen, then the one
with the smallest micro-batch. Settings that the configuration forces are not varied.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any, Literal

from fitune.allocator.prediction import other_routing
from fitune.config import Recompute, RunConfig
from fitune.errors import ConfigError, ModelError, TooLongError
from fitune.language import say
from fitune.planning.candidates import (
    candidate_of,
    describe_choice,
    other_estimates_of,
    planned_data,
)
from fitune.planning.choices import RECOMPUTES, Choice, host_choices, proposals, same_choices
from fitune.planning.compiling import compile_note
from fitune.planning.forecast import Forecast, Forecaster
from fitune.planning.limits import Lengths, MemoryLimits, find_lengths, find_limits, free_bytes
from fitune.planning.optimizer_facts import plan_training
from fitune.planning.plan import FirstAnswer, Plan, PlannedDevice, PlannedModel, sizes_of
from fitune.planning.pricing import PARTS, Bound, Pricer
from fitune.planning.second_process import divide
from fitune.planning.several_cards import (
    keep_bucket,
    not_modelled,
    not_modelled_sharded,
    shards_of,
    share_of,
)
from fitune.recorder.events import ROUTED
from fitune.units import format_bytes

Search = Literal["all", "brief", "fastest"]


def choose_plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    limits: MemoryLimits | None = None,
    lengths: Lengths | None = None,
    search: Search = "all",
    num_gpus: int = 1,
    on_stage: Callable[[str], None] | None = None,
    on_first: Callable[[FirstAnswer], None] | None = None,
) -> Plan:
    """Return a plan with its candidates and the chosen one; `chosen` is None where nothing fits.

    gpu: a card's name, or 'cpu'.
    limits, lengths: if known already; else they are found from the configuration.
    search: "all" predicts every candidate. "brief" predicts those that most users want to see: the
        fastest that fits, the same setting with smaller micro-batches, and the setting that needs
        the least memory. "fastest" stops as soon as no other candidate can be faster than one that
        fits.
    num_gpus: the number of equal cards that share the samples of a step; memory is of each card.
    on_stage: called with a text that says what is being done.
    on_first: called with the answer whether the first predicted setting fits: the configured one,
        unless the configuration leaves the micro-batch open.

    Raises what the checks of the configuration and of the model raise.
    """
    notify = on_stage or _ignore
    num_shards = shards_of(config.model, num_gpus)
    limits = limits or find_limits(config.memory, gpu=gpu)
    if num_shards == 1:
        limits = keep_bucket(limits, num_gpus)
    if lengths is None:
        notify(say("reading the data"))
        lengths = find_lengths(config)
    forecaster = Forecaster(share_of(config, num_gpus), limits, lengths, num_shards=num_shards)
    if not forecaster.known:
        notify(say("loading torch and transformers"))
        forecaster.load()
    if limits.device.kind == "cpu":
        notify(say("measuring how fast this processor is"))
    searching = _Search(config, forecaster, notify, num_gpus=num_gpus, on_first=on_first)
    searches = {"all": searching.thorough, "brief": searching.brief, "fastest": searching.lean}
    chosen = searches[search]()
    if chosen is None and config.model.compile:
        chosen = searching.nearest()
    # a setting that took too long to record may fit, so nobody knows that nothing fits
    if chosen is None and searching.too_long is not None:
        raise searching.too_long
    notes = list(searching.other_routing(chosen)) if search != "fastest" and chosen else ()
    plan = searching.plan(chosen, notes)
    forecaster.save()
    return plan


class _Search:
    """The search for the fastest setting of one configuration.

    It predicts settings one after another (`looked_at`), with several cards those of one card.
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

    def thorough(self) -> Choice | None:
        """Predict every setting, and return the fastest that fits."""
        self.num_expected, self.skips_hopeless = len(self.choices), False
        # The first variant is predicted alone: its imports and recordings are of use to both
        # processes that predict the others.
        self.look_at(self.of_variant(self.choices[0]))
        # Gradient checkpointing makes no setting faster, so the fastest of these is the base of
        # the proposals, unless nothing fits.
        self.look_at([*self.choices, *self.proposals(min(self.looked_at, key=self.order))])
        self.look_at(self.worth_updating_on_host(self.fastest()))
        chosen = self.fastest()
        same = self.same_result()
        smallest = min(same, key=lambda choice: same[choice].device_bytes)
        proposed = self.best_proposals(
            smallest if chosen is None else min(same, key=self.order), chosen or smallest
        )
        self.looked_at = same
        self.look_at(proposed)
        return chosen

    def brief(self) -> Choice | None:
        """Predict the settings that most users want to see, and return the fastest that fits.

        These are all micro-batches without gradient checkpointing, others as far as they may be
        faster, and the setting of least memory: both ends of what is possible. Settings that
        would change the result are only proposed where nothing fits.
        """
        self.skips_hopeless = True
        leanest, first = self.of_variant(self.choices[-1])[0], self.of_variant(self.choices[0])
        self.num_expected = len({*first, leanest})
        self.look_at(first)
        chosen = self.lean()
        if chosen is None:
            return self.thorough()
        self.look_at([leanest])
        return chosen

    def of_variant(self, wanted: Choice) -> list[Choice]:
        """Return the settings that differ from `wanted` in the size of micro-batches alone."""
        return [choice for choice in self.choices if choice.variant == wanted.variant]

    def same_result(self) -> dict[Choice, Forecast]:
        """Return the settings predicted so far that do not change the result."""
        return {
            choice: found for choice, found in self.looked_at.items() if choice.result == "same"
        }

    def fastest(self) -> Choice | None:
        """Return the fastest setting that was predicted to fit and does not change the result."""
        same = (choice for choice, found in self.same_result().items() if found.fits)
        return min(same, key=self.order, default=None)

    def nearest(self) -> Choice | None:
        """Return the setting of least memory, for predictions that are upper bounds.

        An upper bound that exceeds the limit does not prove that the setting does not fit.
        """
        same = self.same_result()
        return min(same, key=lambda choice: same[choice].device_bytes, default=None)

    def worth_updating_on_host(self, chosen: Choice | None) -> list[Choice]:
        """Return the settings with the optimizer's update on the host that are worth predicting.

        These are all of them where nothing fits, else those that are faster than `chosen`.
        """
        if chosen is None:
            return self.on_host
        if self.pricer.seconds(chosen) is None:
            return []
        known = [
            choice for choice in self.on_host if replace(choice, optimizer=None) in self.looked_at
        ]
        return [choice for choice in known if self.order(choice) < self.order(chosen)]

    def proposals(self, choice: Choice) -> list[Choice]:
        """Return variants of `choice` that would change the result, for the user to decide on."""
        half_is_fast = self.limits.device.bfloat16_flops_per_second is not None
        float32 = self.looked_at[choice].precision == "float32" and half_is_fast
        return list(proposals(self.config.model, self.config.optim, choice, float32=float32))

    def best_proposals(self, base: Choice, marked: Choice) -> list[Choice]:
        """Return each proposal with the fastest of its micro-batches that fits.

        A proposal changes `base`. If no micro-batch of it fits, it changes `marked` instead, which
        has the gradient checkpointing that makes it fit.
        """
        alike = [choice for choice in self.choices if choice.variant == base.variant]
        found = []
        for proposal, fallback in zip(self.proposals(base), self.proposals(marked), strict=True):
            sizes = [
                replace(proposal, micro_rows=each.micro_rows, micro_tokens=each.micro_tokens)
                for each in alike
            ]
            fitting = [choice for choice in sizes if self.fits(choice)]
            found.append(min(fitting, key=self.order, default=fallback))
        return found

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

    def lean(self) -> Choice | None:
        """Predict as few settings as possible, and return the fastest that fits.

        This is a best-first search. The time of a setting is not known before it is recorded, so
        the queue holds lower bounds: a setting is no faster than the same without gradient
        checkpointing ("base"), and one that checkpoints a part of the layers takes longer by that
        part of the time that checkpointing all of them adds ("layers"). If not even the smallest
        micro-batch of the first variant fits, only settings whose memory may fit are timed.
        """
        self.skips_hopeless = True
        waiting: list[tuple[tuple[object, ...], int, Bound | None]] = []
        choices = [*self.choices, *self.on_host]
        self.fits(self.choices[0])
        is_tight = self.is_hopeless(self.choices[0])
        for number, choice in enumerate(choices):
            if is_tight and (self.is_hopeless(choice) or not self.may_fit(choice.variant)):
                continue
            tight_bound: Bound | None = "layers" if choice.offloads else None
            bound: Bound | None = tight_bound if is_tight else "base"
            with self.refusing(choice):
                heappush(waiting, (self.order(choice, bound=bound), number, bound))
        while waiting:
            _, number, bound = heappop(waiting)
            choice = choices[number]
            if self.is_hopeless(choice):
                continue
            if bound is not None:
                by_layers = bound == "base" and (choice.offloads or choice.recompute in PARTS)
                further: Bound | None = "layers" if by_layers else None
                with self.refusing(choice):
                    heappush(waiting, (self.order(choice, bound=further), number, further))
            elif self.fits(choice):
                return choice
        return None

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

    def other_routing(self, chosen: Choice) -> Iterator[str]:
        """Yield what the chosen setting needs with the other routing of tokens to experts.

        Nothing where the routing is irrelevant to the memory.
        """
        found, routing = self.looked_at[chosen], self.config.memory.routing
        if ROUTED[routing] in found.notes:
            with self.refusing(chosen):
                allocated_bytes = self.forecaster.other_routing_bytes(chosen)
                yield (
                    f"memory.routing={other_routing(routing)}: the marked one would have "
                    f"{format_bytes(allocated_bytes)} allocated at its peak instead of "
                    f"{format_bytes(found.allocated_bytes)}"
                )

    def plan(self, chosen: Choice | None, notes: Sequence[str] = ()) -> Plan:
        """Return the plan of all settings that were predicted. notes: further assumptions."""
        same = sorted(
            (choice for choice in self.looked_at if choice.result == "same"), key=self.order
        )
        order = same + sorted(
            (choice for choice in self.looked_at if choice.result != "same"), key=self.order
        )
        marked = chosen or min(same, key=lambda choice: self.looked_at[choice].device_bytes)
        shown = self.looked_at[marked]
        device = self.limits.device
        return Plan(
            model=PlannedModel(
                name=self.config.model.source,
                num_parameters=shown.num_parameters,
                num_trainable_parameters=shown.num_trainable_parameters,
                num_layers=shown.num_layers,
                hidden_size=shown.hidden_size,
                vocab_size=shown.vocab_size,
            ),
            device=PlannedDevice(
                name=device.name,
                kind=device.kind,
                total_bytes=device.total_bytes,
                free_bytes=free_bytes(device),
                context_bytes=shown.context_bytes,
            ),
            budget_bytes=self.limits.budget_bytes,
            data=planned_data(
                self.lengths,
                max_length=self.whole.data.max_length,
                rows_per_step=self.whole.batch.rows_per_step,
                num_gpus=self.num_gpus,
            ),
            training=plan_training(self.whole, self.lengths, precision=shown.precision),
            candidates=tuple(
                candidate_of(
                    self.forecaster,
                    choice,
                    self.looked_at[choice],
                    seconds_per_step=self.pricer.seconds(choice),
                    num_gpus=self.num_gpus,
                )
                for choice in order
            ),
            chosen=None if chosen is None else order.index(chosen),
            configured=order.index(self.configured) if self.configured in self.looked_at else None,
            others=tuple(other_estimates_of(self.forecaster, marked, shown)),
            assumptions=(
                self.pricer.assumption,
                *self.for_several(shown),
                *self.compiling(chosen, shown),
                *shown.notes,
                *notes,
                *self.refused,
            ),
        )

    def compiling(self, chosen: Choice | None, shown: Forecast) -> Iterator[str]:
        """Yield what compiled layers would save of a step on the card."""
        model, on_card = self.config.model, self.limits.device.kind == "cuda"
        if chosen and on_card and not model.compile and model.shard == "none":
            seconds = self.pricer.with_compiled_layers(chosen, shown.num_layers)
            length = plan_training(self.whole, self.lengths, precision=shown.precision).length
            if seconds is not None:
                yield compile_note(*seconds, num_steps=None if length is None else length.steps)

    def for_several(self, shown: Forecast) -> Iterator[str]:
        """Yield what the predicted times lack where several cards train together."""
        if self.forecaster.num_shards > 1:
            yield not_modelled_sharded(shown.num_parameters, self.num_gpus)
        elif self.num_gpus > 1:
            yield not_modelled(shown.num_trainable_parameters, self.num_gpus)


#: the gradient checkpointing that saves fewer activations than the given one
_SAVES_FEWER: Mapping[Recompute, Recompute] = {"every_4": "every_2", "every_2": "full"}


def _ignore(_: str) -> None: ...
