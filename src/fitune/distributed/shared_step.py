"""Sums the gradients of several processes that each compute their own samples of a batch.

Each process divides its losses by the weight N of the whole batch, and may have had to leave samples out, which the
others do not know until they meet. So they exchange a report first, correct N, and then sum gradients in float32. From
there on every process does the same.
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
    """The processes of a step, this one among them."""

    def exchange(self, value: T) -> list[T]:
        """Return what each process gave, in their order. Raises FituneError where one of them stops instead."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of all processes' tensors in its place, computed in float32.

        Raises RestartError where a process is lost.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a process has computed in a step, or what all have computed together."""

    #: the row ids of each micro-batch; those of several processes one after another, with an empty one between them
    plan: tuple[tuple[int, ...], ...]
    #: of each micro-batch
    losses: tuple[float, ...]
    #: of each micro-batch, as `NormRecorder` has them
    norms: tuple[float, ...]
    weights: tuple[float, ...]
    #: samples newly left out, and their loss weight
    left_out: tuple[int, ...]
    lost_weight: float
    #: places of the trained parameters that have no gradient
    missing: tuple[int, ...]
    #: by process: what saves memory there
    fallbacks: tuple[tuple[str, ...], ...]


def remaining_weight(loss_weight: float, lost_weight: float) -> float:
    """Return N without the samples that were left out; 0 where nothing is left."""
    left = loss_weight - lost_weight
    return left if left > _ROUNDING * loss_weight else 0.0


def sum_gradients(own: StepReport, gradients: Sequence[Tensor], peers: ExchangePeers, loss_weight: float) -> StepReport:
    """Sum the gradients of all processes in place, and return what all have reported.

    loss_weight: of the whole batch. Where no target is left, gradients stay as they are. gradients: empty where they
    are summed already, as those of a sharded model are.
    """
    reports = peers.exchange(own)
    left = remaining_weight(loss_weight, sum(each.lost_weight for each in reports))
    if left == 0:
        return _together(reports, [1.0] * len(reports))
    # each process has divided by N without its own lost samples only
    factors = [remaining_weight(loss_weight, each.lost_weight) / left for each in reports]
    own_factor = remaining_weight(loss_weight, own.lost_weight) / left
    if own_factor != 1:
        torch._foreach_mul_(list(gradients), own_factor)
    if gradients:
        peers.sum(gradients)
    return _together(reports, factors)


def _together(reports: Sequence[StepReport], factors: Sequence[float]) -> StepReport:
    """factors: what each process's gradients were multiplied by; norms are squares."""
    plan = reports[0].plan
    for each in reports[1:]:
        plan = (*plan, (), *each.plan)
    pairs = list(zip(reports, factors, strict=True))
    return StepReport(
        plan=plan,
        losses=tuple(loss * factor for each, factor in pairs for loss in each.losses),
        norms=tuple(norm * factor**2 for each, factor in pairs for norm in each.norms),
        weights=tuple(weight for each in reports for weight in each.weights),
        left_out=tuple(sorted(row for each in reports for row in each.left_out)),
        lost_weight=sum(each.lost_weight for each in reports),
        missing=tuple(sorted(set.intersection(*(set(each.missing) for each in reports)))),
        fallbacks=tuple(names for each in reports for names in each.fallbacks),
    )
