"""Turns the predicted settings of a search into its plan."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fitune.allocator.prediction import other_routing
from fitune.config import ReferenceKind
from fitune.planning.candidates import candidate_of, other_estimates_of, planned_data
from fitune.planning.choices import Choice
from fitune.planning.compiling import compile_note
from fitune.planning.forecast import Forecast
from fitune.planning.limits import free_bytes
from fitune.planning.optimizer_facts import plan_training
from fitune.planning.plan import Plan, PlannedDevice, PlannedModel
from fitune.planning.predicted_settings import PredictedSettings
from fitune.planning.several_cards import not_modelled, not_modelled_sharded
from fitune.recorder.events import ROUTED
from fitune.units import format_bytes, format_seconds


def plan_of(settings: PredictedSettings, chosen: Choice | None, notes: Sequence[str] = ()) -> Plan:
    """Return the plan of all settings that were predicted. notes: further assumptions."""
    same = sorted(
        (choice for choice in settings.looked_at if choice.result == "same"), key=settings.order
    )
    order = same + sorted(
        (choice for choice in settings.looked_at if choice.result != "same"), key=settings.order
    )
    marked = chosen or min(same, key=lambda choice: settings.looked_at[choice].device_bytes)
    shown = settings.looked_at[marked]
    device = settings.limits.device
    reference_seconds = settings.pricer.reference_seconds(marked)
    return Plan(
        model=PlannedModel(
            name=settings.config.model.source,
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
        budget_bytes=settings.limits.budget_bytes,
        data=planned_data(
            settings.lengths,
            max_length=settings.whole.data.max_length,
            rows_per_step=settings.whole.batch.rows_per_step,
            num_gpus=settings.num_gpus,
        ),
        training=replace(
            plan_training(settings.whole, settings.lengths, precision=shown.precision),
            reference_seconds=reference_seconds,
        ),
        candidates=tuple(
            candidate_of(
                settings.forecaster,
                choice,
                settings.looked_at[choice],
                seconds_per_step=settings.pricer.seconds(choice),
                num_gpus=settings.num_gpus,
            )
            for choice in order
        ),
        chosen=None if chosen is None else order.index(chosen),
        configured=order.index(settings.configured)
        if settings.configured in settings.looked_at
        else None,
        others=tuple(other_estimates_of(settings.forecaster, marked, shown)),
        assumptions=(
            settings.pricer.assumption,
            *_reference(settings.config.reference, reference_seconds),
            *_for_several(settings, shown),
            *_compiling(settings, chosen, shown),
            *shown.notes,
            *notes,
            *settings.refused,
        ),
    )


def other_routing_notes(settings: PredictedSettings, chosen: Choice) -> Iterator[str]:
    """Yield the memory of the chosen setting with the other routing of tokens to experts.

    Nothing where the routing is irrelevant to the memory.
    """
    found, routing = settings.looked_at[chosen], settings.config.memory.routing
    if ROUTED[routing] in found.notes:
        with settings.refusing(chosen):
            allocated_bytes = settings.forecaster.other_routing_bytes(chosen)
            yield (
                f"memory.routing={other_routing(routing)}: the marked one would have "
                f"{format_bytes(allocated_bytes)} allocated at its peak instead of "
                f"{format_bytes(found.allocated_bytes)}"
            )


def _reference(kind: ReferenceKind | None, seconds: float | None) -> Iterator[str]:
    """Yield where the log-probabilities under the reference come from, and what they cost."""
    if kind == "kept" and seconds is None:
        yield (
            "reference: kept as two numbers a sample, which needs the least memory: computed once "
            "before the first step"
        )
    elif kind == "kept":
        yield (
            "reference: kept as two numbers a sample, which needs the least memory: computed once "
            f"before the first step, about {format_seconds(seconds)} over the samples"
        )
    elif kind == "adapter_off":
        yield "reference: the model without its adapters, one more forward in each micro-batch"
    elif kind == "frozen_copy":
        yield "reference: a frozen copy of the model, whose weights are in memory too"


def _compiling(
    settings: PredictedSettings, chosen: Choice | None, shown: Forecast
) -> Iterator[str]:
    """Yield what compiled layers would save of a step on the card."""
    model, on_card = settings.config.model, settings.limits.device.kind == "cuda"
    if chosen and on_card and not model.compile and model.shard == "none":
        seconds = settings.pricer.with_compiled_layers(chosen, shown.num_layers)
        length = plan_training(settings.whole, settings.lengths, precision=shown.precision).length
        if seconds is not None:
            yield compile_note(*seconds, num_steps=None if length is None else length.steps)


def _for_several(settings: PredictedSettings, shown: Forecast) -> Iterator[str]:
    """Yield what the predicted times lack where several cards train together."""
    if settings.forecaster.num_shards > 1:
        yield not_modelled_sharded(shown.num_parameters, settings.num_gpus)
    elif settings.num_gpus > 1:
        yield not_modelled(shown.num_trainable_parameters, settings.num_gpus)
