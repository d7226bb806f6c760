"""Evaluates a model without ending when memory runs out.

The evaluation has its own size of micro-batches. What fits here says nothing about training, which
stores activations for the backward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice

from torch import nn

from fitune.data.rows import MicroBatch
from fitune.data.unpacking import split_again
from fitune.distributed.sharding import AbortedError, Shards
from fitune.errors import OutOfMemoryError
from fitune.machine.out_of_memory import memory_failure, needed_bytes, release_memory
from fitune.model.evaluation_mode import evaluation_mode
from fitune.recovery.failure import ELSEWHERE, Failure, missing_memory
from fitune.step.evaluate import EvalResult, EvalTotals
from fitune.step.work import StepSettings


@dataclass(frozen=True, slots=True)
class SafeEvaluation:
    """The result of an evaluation, and the failures that it survived."""

    result: EvalResult
    #: the largest micro-batch in padded tokens; None if no micro-batch was too large
    most_positions: int | None
    failures: tuple[Failure, ...] = ()
    #: row ids of the samples that did not fit alone
    left_out: tuple[int, ...] = ()


def safe_evaluate(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    settings: StepSettings,
    query_free_bytes: Callable[[], int | None],
    most_positions: int | None = None,
    quarantine: bool = False,
    shards: Shards | None = None,
) -> SafeEvaluation:
    """Evaluate as `evaluate` does, with smaller micro-batches each time memory runs out.

    query_free_bytes: returns the free bytes.
    most_positions: the size that an earlier evaluation found to fit.
    shards: if the model is sharded, its processes compute each pass together, and a process that
        fails repeats its samples.

    Raises OutOfMemoryError if a single sample does not fit, unless `quarantine` leaves such samples
    out.
    """
    device = next(model.parameters()).device
    totals = EvalTotals(model, settings)
    failures: list[Failure] = []
    left_out: list[int] = []
    remaining, pending = iter(micro_batches), list[MicroBatch]()
    with evaluation_mode(model):
        while True:
            pending = pending or _at_most(list(islice(remaining, 1)), most_positions)
            try:
                if not (bool(pending) if shards is None else shards.more(bool(pending))):
                    break
                failure = _evaluate_one(totals, next(iter(pending), None), shards)
            except AbortedError:
                failure = ELSEWHERE
            if failure is None:
                del pending[:1]
                continue
            if shards is not None:
                shards.take_back()
            release_memory(device)
            if failure is not ELSEWHERE:
                failure = replace(failure, free_bytes=query_free_bytes())
                if len(failure.row_ids) > 1:
                    most_positions = failure.num_positions // 2
                    pending = _at_most(pending, most_positions)
                    action = f"evaluated in micro-batches of at most {most_positions:,} tokens with padding from now on"
                elif quarantine:
                    left_out += pending.pop(0).row_ids
                    action = f"sample {failure.row_ids[0]} is not evaluated"
                else:
                    raise OutOfMemoryError(
                        f"{missing_memory(failure)}: lower data.max_length, or leave such samples out with "
                        "memory.on_oom=quarantine"
                    )
                failure = replace(failure, action=action)
            failures += [failure] if shards is None else _all_failures(failure, shards)
    if shards is not None:
        shards.rest()
    return SafeEvaluation(totals.result(), most_positions, tuple(failures), tuple(left_out))


def _all_failures(own: Failure, shards: Shards) -> list[Failure]:
    """Return the failures of all processes. Raises the error of a process that ends."""
    every = shards.peers.exchange(replace(own, rank=shards.peers.rank))
    return [failure for failure in every if failure.place != ELSEWHERE.place]


def _at_most(micro_batches: list[MicroBatch], most_positions: int | None) -> list[MicroBatch]:
    if most_positions is None:
        return micro_batches
    return [
        part
        for micro_batch in micro_batches
        for part in (
            split_again(micro_batch, most_positions)
            if micro_batch.num_positions > most_positions
            else [micro_batch]
        )
    ]


def _evaluate_one(
    totals: EvalTotals, micro_batch: MicroBatch | None, shards: Shards | None
) -> Failure | None:
    """Add a micro-batch to the totals, and return the failure if memory runs out.

    micro_batch: None if only other processes have samples left.
    """
    try:
        if micro_batch is not None:
            totals.add(micro_batch)
        elif shards is not None:
            totals.pass_by(shards.idle)
    except AbortedError:
        raise
    except Exception as error:
        if shards is not None:
            shards.leave()
        where = memory_failure(error)
        if where == "host":
            raise OutOfMemoryError(
                "the machine's own memory ran out in an evaluation: close other programs"
            ) from error
        if where is None:
            raise
        return Failure(
            place="evaluation",
            row_ids=() if micro_batch is None else micro_batch.row_ids,
            num_positions=0 if micro_batch is None else micro_batch.num_positions,
            needed_bytes=needed_bytes(error),
        )
    return None
