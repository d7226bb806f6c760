"""Adapts a plan to several cards.

Each card computes its share of the samples, and sums its gradients with the others' in a buffer.
"""

from collections.abc import Mapping
from dataclasses import replace

from fitune.allocator.prediction import Prediction
from fitune.config import BatchConfig, ModelConfig, RunConfig
from fitune.distributed.processes import BUCKET_BYTES
from fitune.planning.limits import MemoryLimits
from fitune.planning.plan import Candidate
from fitune.recorder.events import Category
from fitune.units import format_bytes, format_count


def share_of(config: RunConfig, num_gpus: int) -> RunConfig:
    """Return the configuration of one card, with its share of the samples.

    The run splits the samples by tokens, so a card with short samples may get more than this.
    """
    if num_gpus == 1:
        return config
    batch = config.batch
    rows = -(-batch.rows_per_step // num_gpus)
    micro = "auto" if batch.micro_rows is None else min(batch.micro_rows, rows)
    share = BatchConfig(effective=rows, micro=micro, micro_tokens=batch.micro_tokens)
    return config.model_copy(update={"batch": share})


def shards_of(model: ModelConfig, num_gpus: int) -> int:
    """Return the number of cards that the weights are sharded over."""
    return 1 if model.shard == "none" else num_gpus


def keep_bucket(limits: MemoryLimits, num_gpus: int) -> MemoryLimits:
    """Return limits that reserve the gradient buffer of several cards."""
    return limits if num_gpus == 1 else replace(limits, kept_bytes=BUCKET_BYTES)


def candidate_with_bucket(candidate: Candidate, num_gpus: int) -> Candidate:
    """Add the gradient buffer of several cards to a candidate that was predicted without it."""
    if num_gpus == 1:
        return candidate
    return replace(
        candidate,
        categories=_with_workspace(candidate.categories),
        predicted_allocated_bytes=candidate.predicted_allocated_bytes + BUCKET_BYTES,
        predicted_reserved_bytes=candidate.predicted_reserved_bytes + BUCKET_BYTES,
        predicted_device_bytes=candidate.predicted_device_bytes + BUCKET_BYTES,
    )


def with_bucket(prediction: Prediction, num_gpus: int) -> Prediction:
    """Add the gradient buffer of several cards to a step that was predicted without it."""
    if num_gpus == 1:
        return prediction
    # the buffer has a segment of its own, so allocated and reserved memory grow by the same
    device_bytes = prediction.device_bytes
    return replace(
        prediction,
        categories=_with_workspace(prediction.categories),
        peak_allocated_bytes=prediction.peak_allocated_bytes + BUCKET_BYTES,
        peak_reserved_bytes=prediction.peak_reserved_bytes + BUCKET_BYTES,
        device_bytes=None if device_bytes is None else device_bytes + BUCKET_BYTES,
    )


def _with_workspace(categories: Mapping[Category, int]) -> dict[Category, int]:
    return dict(categories) | {"workspace": categories.get("workspace", 0) + BUCKET_BYTES}


def not_modelled_sharded(num_parameters: int, num_gpus: int) -> str:
    """Return a text that says what the predicted time of a sharded model lacks."""
    return (
        f"gathering {format_count(num_parameters)} parameters over {num_gpus} cards, before each layer's forward and "
        "again before its backward, is not in the time, nor is the sum of their gradients behind each micro-batch: the "
        "rate of the cards' links is not known"
    )


def not_modelled(num_trainable_parameters: int, num_gpus: int) -> str:
    """Return a text that says what the predicted time of several cards lacks.

    In a ring all-reduce each of n cards sends 2 (n - 1) / n of the data (Patarasuk and Yuan, 2009).
    """
    sent = 4 * num_trainable_parameters * 2 * (num_gpus - 1) // num_gpus
    return (
        f"the sum of the gradients over {num_gpus} cards is not in the time, since the rate of their links is not "
        f"known: each card sends {format_bytes(sent)} a step"
    )
