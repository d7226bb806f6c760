"""What several cards change in a plan: each computes its share of the rows, and sums its gradients in a buffer."""

from collections.abc import Mapping
from dataclasses import replace

from fitune.allocator.prediction import Prediction
from fitune.config import BatchConfig, RunConfig
from fitune.distributed.processes import BUCKET_BYTES
from fitune.planning.limits import MemoryLimits
from fitune.planning.plan import Candidate
from fitune.trace.events import Category
from fitune.units import format_bytes, format_count


def share_of(config: RunConfig, num_gpus: int) -> RunConfig:
    """The configuration of one card. The rows are dealt by tokens, so that a card with short ones may have more."""
    if num_gpus == 1:
        return config
    batch = config.batch
    rows = -(-batch.rows_per_step // num_gpus)
    micro = "auto" if batch.micro_rows is None else min(batch.micro_rows, rows)
    share = BatchConfig(effective=rows, micro=micro, micro_tokens=batch.micro_tokens)
    return config.model_copy(update={"batch": share})


def shards_of(config: RunConfig, num_gpus: int) -> int:
    """The cards that the weights are dealt over."""
    return 1 if config.model.shard == "none" else num_gpus


def keep_bucket(limits: MemoryLimits, num_gpus: int) -> MemoryLimits:
    return limits if num_gpus == 1 else replace(limits, kept_bytes=BUCKET_BYTES)


def candidate_with_bucket(candidate: Candidate, num_gpus: int) -> Candidate:
    """Which was predicted without it, within limits that leave it out."""
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
    """Of a step that was predicted without it. It is a segment of the allocator's own, so both peaks grow alike."""
    if num_gpus == 1:
        return prediction
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
    """What the time of a sharded model lacks."""
    return (
        f"gathering {format_count(num_parameters)} parameters over {num_gpus} cards, before each layer's forward and "
        "again before its backward, is not in the time, nor is the sum of their gradients behind each micro-batch: the "
        "rate of the cards' links is not known"
    )


def not_modelled(num_trainable_parameters: int, num_gpus: int) -> str:
    """What the time lacks. A ring sends 2 (n - 1) / n of the data from each card (Patarasuk and Yuan, 2009)."""
    sent = 4 * num_trainable_parameters * 2 * (num_gpus - 1) // num_gpus
    return (
        f"the sum of the gradients over {num_gpus} cards is not in the time, since the rate of their links is not "
        f"known: each card sends {format_bytes(sent)} a step"
    )
