"""Sum the gradients of several processes that each compute their own samples of a batch.

Each process divides its losses by the weight N of the whole batch. A process may have to leave
samples out, which the others learn only at the end of the step. So the processes exchange a report
first, correct N, and then sum the gradients in float32. After that all processes have the same
gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
#: Relative to N. A remaining loss weight below it is rounding error and counts as zero.
_ROUNDING = 1e-9


class ExchangePeers(Protocol):
    """The processes of a step, this one included."""

    def exchange(self, value: T) -> list[T]:
        """Return the value of each process, by rank. Raises FituneError where one stops instead."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, computed in float32.

        Raises RestartError where a process is lost.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one process has computed in a step, or all of them together."""

    #: the row ids of each micro-batch; those of several processes one after another, with an empty
    #: tuple between two processes
    plan: tuple[tuple[int, ...], ...]
    #: of each micro-batch the loss, and what `Objective.means` adds
    losses: tuple[tuple[float, ...], ...]
    #: the squared gradient norm of each micro-batch, as `NormRecorder` records it
    norms: tuple[float, ...]
    #: the loss weight of each micro-batch
    weights: tuple[float, ...]
    #: row ids of the samples that were newly left out
    left_out: tuple[int, ...]
    #: the loss weight of those samples
    lost_weight: float
    #: indices of the trained parameters that have no gradient
    missing: tuple[int, ...]
    #: for each process, the names of the fallbacks that save memory there
    fallbacks: tuple[tuple[str, ...], ...]


def remaining_weight(loss_weight: float, lost_weight: float) -> float:
    """Return N without the samples that were left out; 0 if no sample remains."""
    left = loss_weight - lost_weight
    return left if left > _ROUNDING * loss_weight else 0.0


def sum_gradients(
    own: StepReport, gradients: Sequence[Tensor], peers: ExchangePeers, loss_weight: float
) -> StepReport:
    """Sum the gradients of all processes in place, and return all processes' reports as one.

    loss_weight: of the whole batch, left-out samples included. If no target remains, the gradients
        stay as they are.
    gradients: empty if they are summed already, as those of a sharded model are.
    """
    reports = peers.exchange(own)
    left = remaining_weight(loss_weight, sum(each.lost_weight for each in reports))
    if left == 0:
        return _combined(reports, [1.0] * len(reports))
    # Each process has divided by N without its own left-out samples, but with those of the others.
    factors = [remaining_weight(loss_weight, each.lost_weight) / left for each in reports]
    own_factor = remaining_weight(loss_weight, own.lost_weight) / left
    if own_factor != 1:
        torch._foreach_mul_(list(gradients), own_factor)
    if gradients:
        peers.sum(gradients)
    return _combined(reports, factors)


def _combined(reports: Sequence[StepReport], factors: Sequence[float]) -> StepReport:
    """Return one report of all processes, with losses and norms scaled to the corrected N.

    factors: what each process's gradients were multiplied by. The norms are squares.
    """
    plan = reports[0].plan
    for each in reports[1:]:
        plan = (*plan, (), *each.plan)
    pairs = list(zip(reports, factors, strict=True))
    return StepReport(
        plan=plan,
        losses=tuple(
            tuple(share * factor for share in shares)
            for each, factor in pairs
            for shares in each.losses
        ),
        norms=tuple(norm * factor**2 for each, factor in pairs for norm in each.norms),
        weights=tuple(weight for each in reports for weight in each.weights),
        left_out=tuple(sorted(row for each in reports for row in each.left_out)),
        lost_weight=sum(each.lost_weight for each in reports),
        missing=tuple(sorted(set.intersection(*(set(each.missing) for each in reports)))),
        fallbacks=tuple(names for each in reports for names in each.fallbacks),
    )
