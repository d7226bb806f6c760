"""Chooses the setting of a run: the fastest one that fits and does not change the training result.

The memory of every candidate is predicted by replaying its allocations against the limit, its time
by a roofline. Among settings of equal time, the one with the fewest changes is chosen, then the one
with the smallest micro-batch. Settings that the configuration forces are not varied.
"""

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from typing import Literal

from fitune.config import RunConfig
from fitune.language import say
from fitune.planning.answer import other_routing_notes, plan_of
from fitune.planning.choices import Choice, open_part, proposals
from fitune.planning.forecast import Forecaster, Library
from fitune.planning.limits import Lengths, MemoryLimits, find_lengths, find_limits
from fitune.planning.plan import FirstAnswer, Plan
from fitune.planning.predicted_settings import PredictedSettings
from fitune.planning.pricing import PARTS, Bound
from fitune.planning.several_cards import keep_bucket, shards_of, share_of

Search = Literal["all", "brief", "fastest"]


def choose_plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    limits: MemoryLimits | None = None,
    lengths: Lengths | None = None,
    search: Search | Choice = "all",
    num_gpus: int = 1,
    library: Library | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_first: Callable[[FirstAnswer], None] | None = None,
) -> Plan:
    """Return a plan with its candidates and the chosen one; `chosen` is None where nothing fits.

    gpu: a card's name, or 'cpu'.
    limits, lengths: if known already; else they are found from the configuration.
    search: "all" predicts every candidate. "brief" predicts those that most users want to see: the
        fastest that fits, the same setting with smaller micro-batches, and the setting that needs
        the least memory. "fastest" stops as soon as no other candidate can be faster than one that
        fits. A choice is predicted alone, as far as the configuration leaves it open.
    num_gpus: the number of equal cards that share the samples of a step; memory is of each card.
    library: the recordings of earlier plans; the result is the same as without it.
    on_stage: called with a text that says what is being done.
    on_first: called with the answer whether the first predicted setting fits: the configured one,
        unless the configuration leaves the micro-batch open.

    Raises what the checks of the configuration and of the model raise.
    """
    notify = on_stage or (lambda _: None)
    if library is not None:
        library.begin_plan()
    num_shards = shards_of(config.model, num_gpus)
    limits = limits or find_limits(config.memory, gpu=gpu)
    if num_shards == 1:
        limits = keep_bucket(limits, num_gpus)
    if lengths is None:
        notify(say("reading the data"))
        lengths = find_lengths(config)
    own = share_of(config, num_gpus)
    forecaster = Forecaster(own, limits, lengths, num_shards=num_shards, library=library)
    if not forecaster.known:
        notify(say("loading torch and transformers"))
        forecaster.load()
    if limits.device.kind == "cpu":
        notify(say("measuring how fast this processor is"))
    searching = _Search(config, forecaster, notify, num_gpus=num_gpus, on_first=on_first)
    searches = {"all": searching.thorough, "brief": searching.brief, "fastest": searching.lean}
    chosen = searching.alone(search) if isinstance(search, Choice) else searches[search]()
    if chosen is None and config.model.compile:
        chosen = searching.nearest()
    # a setting that took too long to record may fit, so nobody knows that nothing fits
    if chosen is None and searching.too_long is not None:
        raise searching.too_long
    is_whole = search in ("all", "brief")
    notes = list(other_routing_notes(searching, chosen)) if is_whole and chosen else ()
    plan = plan_of(searching, chosen, notes)
    forecaster.save()
    return plan


class _Search(PredictedSettings):
    """The search for the fastest setting of one configuration."""

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

    def alone(self, wanted: Choice) -> Choice | None:
        """Predict this setting alone, and return it if it fits."""
        choice = open_part(wanted, self.choices, self.config.batch, self.lengths)
        self.looked_at[choice] = found = self.forecaster.forecast(choice)
        return choice if found.fits else None

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

    def nearest(self) -> Choice | None:
        """Return the setting of least memory, for predictions that are upper bounds.

        An upper bound that exceeds the limit does not prove that the setting does not fit.
        """
        same = self.same_result()
        return min(same, key=lambda choice: same[choice].device_bytes, default=None)

    def of_variant(self, wanted: Choice) -> list[Choice]:
        """Return the settings that differ from `wanted` in the size of micro-batches alone."""
        return [choice for choice in self.choices if choice.variant == wanted.variant]

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
