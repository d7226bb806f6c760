"""Which setting to run: the fastest that leaves the result the same and fits.

Every candidate's memory is predicted by replay against the limit, its time by a roofline. Of equal times the setting
with the fewest changes is chosen, then the smallest micro-batch. What the configuration forces is not varied.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any, Literal

from fitune.allocator.prediction import other_routing
from fitune.config import Recompute, RunConfig
from fitune.errors import ConfigError, ModelError, TooLongError
from fitune.language import say
from fitune.planning.choices import RECOMPUTES, Choice, host_choices, proposals, same_choices
from fitune.planning.forecast import Forecast, Forecaster
from fitune.planning.limits import Lengths, MemoryLimits, find_lengths, find_limits, free_bytes
from fitune.planning.optimizer_facts import plan_training
from fitune.planning.other_estimates import other_estimates
from fitune.planning.plan import Candidate, FirstAnswer, OtherEstimate, Plan, PlannedDevice, PlannedModel, sizes_of
from fitune.planning.pricing import PARTS, Bound, Pricer
from fitune.planning.second_process import divide
from fitune.planning.several_cards import (
    candidate_with_bucket,
    keep_bucket,
    not_modelled,
    not_modelled_sharded,
    shards_of,
    share_of,
)
from fitune.trace.events import ROUTED
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
    """The candidates and the chosen one; none where nothing fits.

    gpu: a card's name, or 'cpu'. limits, lengths: where they are known already, else found from the configuration.
    search: "all" predicts every candidate. "brief" predicts those that answer what most people ask: the fastest that
    fits, smaller micro-batches of the same, and what needs the least memory. "fastest" stops where none of the others
    can be faster than one that fits.
    num_gpus: so many alike, which share the rows of a step; memory is that of each.
    on_stage: told in words what is being done. on_first: told whether the first setting fits that is looked at, which
    is the configured one where the configuration does not leave the micro-batch open.
    Raises what the configuration's and the model's checks raise.
    """
    tell = on_stage or _say_nothing
    num_shards = shards_of(config, num_gpus)
    limits = limits or find_limits(config, gpu=gpu)
    if num_shards == 1:
        limits = keep_bucket(limits, num_gpus)
    if lengths is None:
        tell(say("reading the data"))
        lengths = find_lengths(config)
    forecaster = Forecaster(share_of(config, num_gpus), limits, lengths, num_shards=num_shards)
    if not forecaster.known:
        tell(say("loading torch and transformers"))
        forecaster.load()
    if limits.device.kind == "cpu":
        tell(say("measuring how fast this processor is"))
    searching = _Search(config, forecaster, tell, num_gpus=num_gpus, on_first=on_first)
    chosen = {"all": searching.thorough, "brief": searching.brief, "fastest": searching.lean}[search]()
    if chosen is None and config.model.compile:
        chosen = searching.nearest()
    if chosen is None and searching.too_long is not None:
        raise searching.too_long  # what nobody looked at may fit
    plan = searching.plan(chosen, list(searching.other_routing(chosen)) if search != "fastest" and chosen else ())
    forecaster.save()
    return plan


class _Search:
    """config: of all cards together; that of one is what is looked at."""

    def __init__(
        self,
        config: RunConfig,
        forecaster: Forecaster,
        on_stage: Callable[[str], None] | None,
        *,
        num_gpus: int = 1,
        on_first: Callable[[FirstAnswer], None] | None = None,
    ) -> None:
        self.config, self.forecaster = share_of(config, num_gpus), forecaster
        self.tell, self.on_first = on_stage or _say_nothing, on_first
        self.whole, self.num_gpus = config, num_gpus
        self.limits, self.lengths = forecaster.limits, forecaster.lengths
        on_card = self.limits.device.kind == "cuda"
        self.choices = list(same_choices(self.config, self.lengths, on_card=on_card))
        self.hosted = host_choices(self.config, self.choices) if on_card else []
        self.pricer = Pricer(forecaster, self.choices)
        self.looked_at: dict[Choice, Forecast] = {}
        self.refused: dict[str, None] = {}
        self.too_long: TooLongError | None = None
        batch = self.config.batch
        self.configured = None if batch.micro_rows is None and batch.micro_tokens == "auto" else self.choices[0]
        self.num_expected = 0
        self.skips_hopeless = False

    def thorough(self) -> Choice | None:
        self.num_expected, self.skips_hopeless = len(self.choices), False
        self.look_at([choice for choice in self.choices if choice.variant == self.choices[0].variant])
        # recomputing makes none faster, so the proposals beside the fastest are known, unless nothing will fit
        self.look_at([*self.choices, *self.proposals(min(self.looked_at, key=self.order))])
        self.look_at(self.worth_hosting(self.fastest()))
        chosen = self.fastest()
        same = {choice: found for choice, found in self.looked_at.items() if choice.result == "same"}
        smallest = min(same, key=lambda choice: same[choice].device_bytes)
        proposed = self.best_proposals(smallest if chosen is None else min(same, key=self.order), chosen or smallest)
        self.looked_at = same
        self.look_at(proposed)
        return chosen

    def brief(self) -> Choice | None:
        """Looks at all sizes without gradient checkpointing, at others as far as they may be faster, and the leanest:
        both ends of what is possible. What would change the result is only proposed where nothing fits."""
        self.skips_hopeless = True
        leanest = next(choice for choice in self.choices if choice.variant == self.choices[-1].variant)
        first = [choice for choice in self.choices if choice.variant == self.choices[0].variant]
        self.num_expected = len({*first, leanest})
        self.look_at(first)
        chosen = self.lean()
        if chosen is None:
            return self.thorough()
        self.look_at([leanest])
        return chosen

    def fastest(self) -> Choice | None:
        same = (choice for choice, found in self.looked_at.items() if found.fits and choice.result == "same")
        return min(same, key=self.order, default=None)

    def nearest(self) -> Choice | None:
        """That of least memory where what is predicted is an upper bound, which refuses nothing."""
        same = {choice: found for choice, found in self.looked_at.items() if choice.result == "same"}
        return min(same, key=lambda choice: same[choice].device_bytes, default=None)

    def worth_hosting(self, chosen: Choice | None) -> list[Choice]:
        """With the update on the host: all where nothing fits, else what would be faster than `chosen`."""
        if chosen is None:
            return self.hosted
        if self.pricer.seconds(chosen) is None:
            return []
        known = [choice for choice in self.hosted if replace(choice, optimizer=None) in self.looked_at]
        return [choice for choice in known if self.order(choice) < self.order(chosen)]

    def proposals(self, choice: Choice) -> list[Choice]:
        half_is_fast = self.limits.device.bfloat16_flops_per_second is not None
        float32 = self.looked_at[choice].precision == "float32" and half_is_fast
        return list(proposals(self.config, choice, float32=float32))

    def best_proposals(self, base: Choice, marked: Choice) -> list[Choice]:
        """Each beside `base` at the fastest of its sizes that fits; where none does, beside the marked one, which needs
        the recomputation that makes it fit."""
        alike = [choice for choice in self.choices if choice.variant == base.variant]
        found = []
        for proposal, fallback in zip(self.proposals(base), self.proposals(marked), strict=True):
            sizes = [replace(proposal, micro_rows=each.micro_rows, micro_tokens=each.micro_tokens) for each in alike]
            fitting = [choice for choice in sizes if self.fits(choice)]
            found.append(min(fitting, key=self.order, default=fallback))
        return found

    def look_at(self, choices: Sequence[Choice]) -> None:
        """In two processes, where there can be, but for the first variant: both need the imports, and what its
        recordings tell of others. What differs in its rows alone shares its recordings."""
        alike: dict[Choice, list[Choice]] = {}
        for choice in choices:
            if not self.forecaster.knows(choice):
                alike.setdefault(choice.variant, []).append(choice)

        def look(choices: list[Choice]) -> None:
            second, *others = choices[1:-1] or choices[:1]
            for choice in (second, choices[-1], *others, choices[0]):  # from two of several rows the others follow
                if not (self.skips_hopeless and self.is_hopeless(choice)):
                    self.fits(choice)
            for choice in choices:  # after all of them: what the memory was found from gives most of the times, too
                if choice in self.looked_at:  # else it was refused
                    self.pricer.seconds(choice)

        def look_beside(choices: list[Choice]) -> dict[str, Any]:
            self.tell, self.on_first = _say_nothing, None
            look(choices)
            return self.forecaster.known

        self.num_expected = max(self.num_expected, len({*self.looked_at, *choices}))
        parts = list(alike.values())
        if len(parts) > 1:
            from fitune.model.recompute import recompute_period

            # what takes longest comes first: those of more layers, then those that tell nothing of each other
            parts.sort(key=lambda part: (-recompute_period(part[0].recompute), part[0].result == "same"))
        self.forecaster.learn(divide(parts, here=look, beside=look_beside) or {})
        for choice in choices:
            if not (self.skips_hopeless and self.is_hopeless(choice)):
                self.fits(choice)

    def lean(self) -> Choice | None:
        """Best first. A variant's time is not known before it is recorded: it is no faster than without recomputing,
        and one that recomputes a part of the layers takes that part of what recomputing all of them takes longer.
        Where not even the smallest micro-batch of the first variant fits, memory decides which others are timed."""
        self.skips_hopeless = True
        waiting: list[tuple[tuple[Any, ...], int, Bound | None]] = []
        choices = [*self.choices, *self.hosted]
        self.fits(self.choices[0])
        is_tight = self.is_hopeless(self.choices[0])
        for number, choice in enumerate(choices):
            if is_tight and (self.is_hopeless(choice) or not self.has_room(choice.variant)):
                continue
            bound: Bound | None = "base" if not is_tight else "layers" if choice.offloads else None
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

    def has_room(self, variant: Choice) -> bool:
        """Whether its smallest micro-batch may fit. Recomputing every fourth layer keeps more than every second, and
        that more than recomputing all, so these are asked first."""
        fewer = _KEEPS_LESS.get(variant.recompute)
        recomputes = {choice.recompute for choice in self.choices}
        if fewer in recomputes and not self.has_room(replace(variant, recompute=fewer)):
            return False
        size = self.choices[0]
        smallest = replace(variant, micro_rows=size.micro_rows, micro_tokens=size.micro_tokens)
        return not self.is_hopeless(smallest) and (self.fits(smallest) or not self.is_hopeless(smallest))

    def is_hopeless(self, choice: Choice) -> bool:
        """Whether what is known of it, of fewer rows at once or of a loss in chunks tells that it cannot fit: tensors
        alone need more than there is."""
        size = choice.micro_tokens or choice.micro_rows or 0
        for known, found in self.looked_at.items():
            if replace(known.variant, loss=choice.loss) == choice.variant and known.loss in ("chunked", choice.loss):
                smaller = (known.micro_tokens or known.micro_rows or 0) <= size
                if smaller and found.allocated_bytes + found.context_bytes > self.limits.limit_bytes:
                    return True
        return False

    def fits(self, choice: Choice) -> bool:
        if choice in self.looked_at:
            return self.looked_at[choice].fits
        done = len(self.looked_at) + 1
        self.tell(say("recording the step: {done} of {total}", done=done, total=max(done, self.num_expected)))
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
        """What this model or machine cannot do is no candidate, but for the first, which is the configuration's own.
        Nor is what takes too long to record, where something was found before."""
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
            self.refused[f"{words_of(choice.variant)}: {error}"] = None

    def order(self, choice: Choice, *, bound: Bound | None = None) -> tuple[Any, ...]:
        """Fastest first, then fewest changes, then smallest. Without times: few changes first, then largest."""
        size = choice.micro_tokens or choice.micro_rows or 0
        seconds = self.pricer.seconds(choice, bound=bound)
        if seconds is None:
            on_host = (choice.optimizer is not None) + choice.offloads
            return math.inf, on_host, RECOMPUTES.index(choice.recompute), choice.num_changes, -size
        return seconds, 0, choice.num_changes, size, RECOMPUTES.index(choice.recompute)

    def other_routing(self, chosen: Choice) -> Iterator[str]:
        """What the chosen one needs where the tokens go to the experts in the other way, if that matters."""
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
        """notes: further assumptions."""
        same = sorted((choice for choice in self.looked_at if choice.result == "same"), key=self.order)
        order = same + sorted((choice for choice in self.looked_at if choice.result != "same"), key=self.order)
        marked = chosen or min(same, key=lambda choice: self.looked_at[choice].device_bytes)
        shown = self.looked_at[marked]
        device, data, rows_per_step = self.limits.device, self.lengths, self.whole.batch.rows_per_step
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
            data={
                "max_length": self.config.data.max_length,
                "row_tokens": data.longest_tokens,
                "row_tokens_origin": data.origin,
                "mean_row_tokens": round(data.mean_tokens, 1),
                "supervised_fraction": round(data.supervised_fraction, 4),
                "gpus": self.num_gpus,
                "effective_batch": rows_per_step,
                "tokens_per_step": round(data.mean_tokens * rows_per_step),
                "epoch_tokens": data.epoch_tokens,
                "epoch_steps": None if data.epoch_rows is None else -(-data.epoch_rows // rows_per_step),
            },
            training=plan_training(self.whole, data, precision=shown.precision),
            candidates=tuple(self.candidate(choice) for choice in order),
            chosen=None if chosen is None else order.index(chosen),
            configured=order.index(self.configured) if self.configured in self.looked_at else None,
            others=tuple(self.others(marked)),
            assumptions=(self.pricer.assumption, *self.for_several(shown), *shown.notes, *notes, *self.refused),
        )

    def for_several(self, shown: Forecast) -> Iterator[str]:
        if self.forecaster.num_shards > 1:
            yield not_modelled_sharded(shown.num_parameters, self.num_gpus)
        elif self.num_gpus > 1:
            yield not_modelled(shown.num_trainable_parameters, self.num_gpus)

    def candidate(self, choice: Choice) -> Candidate:
        forecast = self.looked_at[choice]
        config = self.config
        candidate = Candidate(
            micro_batch=forecast.micro_batch,
            micro_tokens=choice.micro_tokens,
            accumulation=max(1, round(self.forecaster.shape(choice, packed=forecast.packed).num_micro_batches)),
            recompute=choice.recompute,
            loss="chunked" if forecast.chunked else "full",
            optimizer=choice.optimizer or config.optim.name,
            precision=forecast.precision,
            method=choice.method or config.model.method,
            attention=config.model.attention,
            packing=forecast.packed,
            predicted_allocated_bytes=forecast.allocated_bytes,
            predicted_reserved_bytes=forecast.reserved_bytes,
            predicted_device_bytes=forecast.device_bytes,
            categories=forecast.categories,
            peak_phase=forecast.peak_phase,
            predicted_seconds_per_step=self.pricer.seconds(choice),
            fits=None if forecast.fits is False and self.is_bound(forecast) else forecast.fits,
            reason=_reason(forecast, self.limits, is_bound=self.is_bound(forecast)),
            result=choice.result,
            offload_activations=choice.offloads or config.model.offload_activations,
            predicted_host_bytes=forecast.host_bytes,
        )
        return candidate if self.forecaster.num_shards > 1 else candidate_with_bucket(candidate, self.num_gpus)

    def is_bound(self, forecast: Forecast) -> bool:
        """Whether compiled layers may take less than that; what the host keeps is what it is."""
        host_bytes = self.limits.host_bytes
        return self.config.model.compile and (host_bytes is None or forecast.host_bytes <= host_bytes)

    def others(self, choice: Choice) -> Iterator[OtherEstimate]:
        forecast = self.looked_at[choice]
        yield from other_estimates(
            forecast.categories,
            num_parameters=forecast.num_parameters,
            method=choice.method or self.config.model.method,
            precision=forecast.precision,
            recompute=choice.recompute,
            positions=forecast.positions,
            hidden_size=forecast.hidden_size,
            num_layers=forecast.num_layers,
        )


_KEEPS_LESS: Mapping[Recompute, Recompute] = {"every_4": "every_2", "every_2": "full"}


def _say_nothing(words: str) -> None:
    """To nobody."""


def words_of(choice: Choice) -> str:
    size = "" if choice.micro_tokens is None else f"{choice.micro_tokens:,} tokens at once, "
    size = size if choice.micro_rows is None else f"{choice.micro_rows} samples at once, "
    changes = ["offload"] if choice.offloads else []
    changes += [part for part in (choice.method, choice.optimizer, choice.precision) if part]
    return ", ".join([f"{size}gradient checkpointing {choice.recompute}", f"{choice.loss} loss", *changes])


def _reason(forecast: Forecast, limits: MemoryLimits, *, is_bound: bool) -> str:
    if limits.host_bytes is not None and forecast.host_bytes > limits.host_bytes:
        needed, free = format_bytes(forecast.host_bytes), format_bytes(limits.host_bytes)
        return f"needs {needed} of the host's memory, where {free} are free"
    if not forecast.fits:
        more = format_bytes(max(forecast.device_bytes - limits.limit_bytes, 1))
        return (
            f"needs at most {more} more: an upper bound, which compiled layers may stay below"
            if is_bound
            else (f"needs {more} more")
        )
    if forecast.num_alloc_retries:
        return f"fits by giving cached blocks back {forecast.num_alloc_retries} times"
    return ""
