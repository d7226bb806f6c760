"""Turns the results of a search into the parts of a plan, and settings into text."""

from collections.abc import Iterator

from fitune.planning.choices import Choice
from fitune.planning.forecast import Forecast, Forecaster
from fitune.planning.limits import Lengths, MemoryLimits
from fitune.planning.other_estimates import other_estimates
from fitune.planning.plan import Candidate, OtherEstimate
from fitune.planning.several_cards import candidate_with_bucket
from fitune.units import format_bytes


def candidate_of(
    forecaster: Forecaster,
    choice: Choice,
    forecast: Forecast,
    *,
    seconds_per_step: float | None,
    num_gpus: int,
) -> Candidate:
    """Return the candidate that a plan shows for this setting."""
    config, limits = forecaster.config, forecaster.limits
    shape = forecaster.shape(choice, packed=forecast.packed)
    is_bound = is_upper_bound(forecaster, forecast)
    candidate = Candidate(
        micro_batch=forecast.micro_batch,
        micro_tokens=choice.micro_tokens,
        accumulation=max(1, round(shape.num_micro_batches)),
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
        predicted_seconds_per_step=seconds_per_step,
        fits=None if forecast.fits is False and is_bound else forecast.fits,
        reason=_reason(forecast, limits, is_bound=is_bound),
        result=choice.result,
        offload_activations=choice.offloads or config.model.offload_activations,
        predicted_host_bytes=forecast.host_bytes,
    )
    # the recording of a sharded step contains its buffers already
    if forecaster.num_shards > 1:
        return candidate
    return candidate_with_bucket(candidate, num_gpus)


def is_upper_bound(forecaster: Forecaster, forecast: Forecast) -> bool:
    """Return whether the run may need less than the forecast, because its layers are compiled.

    That holds for the card alone: a forecast that exceeds the host's memory is no upper bound.
    """
    host_bytes = forecaster.limits.host_bytes
    fits_on_host = host_bytes is None or forecast.host_bytes <= host_bytes
    return forecaster.config.model.compile and fits_on_host


def other_estimates_of(
    forecaster: Forecaster, choice: Choice, forecast: Forecast
) -> Iterator[OtherEstimate]:
    """Yield what other estimators say of this setting."""
    return other_estimates(
        forecast.categories,
        num_parameters=forecast.num_parameters,
        method=choice.method or forecaster.config.model.method,
        precision=forecast.precision,
        recompute=choice.recompute,
        positions=forecast.positions,
        hidden_size=forecast.hidden_size,
        num_layers=forecast.num_layers,
    )


def planned_data(
    lengths: Lengths, *, max_length: int, rows_per_step: int, num_gpus: int
) -> dict[str, object]:
    """Return what a plan shows of the data: lengths and numbers of the samples.

    rows_per_step: of all cards together.
    """
    epoch_rows = lengths.epoch_rows
    return {
        "max_length": max_length,
        "row_tokens": lengths.longest_tokens,
        "row_tokens_origin": lengths.origin,
        "mean_row_tokens": round(lengths.mean_tokens, 1),
        "supervised_fraction": round(lengths.supervised_fraction, 4),
        "gpus": num_gpus,
        "effective_batch": rows_per_step,
        "tokens_per_step": round(lengths.mean_tokens * rows_per_step),
        "epoch_tokens": lengths.epoch_tokens,
        "epoch_steps": None if epoch_rows is None else -(-epoch_rows // rows_per_step),
    }


def describe_choice(choice: Choice) -> str:
    """Return the setting as text: '6 samples at once, gradient checkpointing off, chunked loss'."""
    size = "" if choice.micro_tokens is None else f"{choice.micro_tokens:,} tokens at once, "
    size = size if choice.micro_rows is None else f"{choice.micro_rows} samples at once, "
    changes = ["offload"] if choice.offloads else []
    changes += [part for part in (choice.method, choice.optimizer, choice.precision) if part]
    return ", ".join(
        [f"{size}gradient checkpointing {choice.recompute}", f"{choice.loss} loss", *changes]
    )


def _reason(forecast: Forecast, limits: MemoryLimits, *, is_bound: bool) -> str:
    """Return why the setting does not fit, or on what condition it fits, or an empty text."""
    if limits.host_bytes is not None and forecast.host_bytes > limits.host_bytes:
        needed, free = format_bytes(forecast.host_bytes), format_bytes(limits.host_bytes)
        return f"needs {needed} of the host's memory, where {free} are free"
    if not forecast.fits:
        more = format_bytes(max(forecast.device_bytes - limits.limit_bytes, 1))
        return (
            f"needs at most {more} more: an upper bound, which compiled layers may stay below"
            if is_bound
            else f"needs {more} more"
        )
    if forecast.num_alloc_retries:
        return f"fits by giving cached blocks back {forecast.num_alloc_retries} times"
    return ""
