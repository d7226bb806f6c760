"""A step whose rows are dealt over several processes, each with a model of its own that is the same in all.

alone     each process computes its rows, divided by the weight N of the whole batch. It runs out of memory, splits and
          tries again alone: nothing waits for another process here, so none can be left waiting
told      when all are done: the losses of each, the rows that it had to leave out, the gradients that it lacks
summed    the gradients, in float32; from here on every process does the same
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_NOTHING_FRACTION = 1e-9
"""Of N: what is left of a difference of weights that should be zero."""


class Peers(Protocol):
    """The processes of a step, this one among them."""

    def exchange(self, value: T) -> list[T]:
        """What each process gave, in their order. Raises FituneError where one of them stops instead."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of all processes' tensors in its place, formed in float32. Of no use where memory
        runs out: raises RestartError where a process is lost."""
        ...


@dataclass(frozen=True)
class SharedStep:
    """loss_weight: of the whole batch, without the rows that are left out already; the same in all processes."""

    peers: Peers
    loss_weight: float


@dataclass(frozen=True, slots=True)
class Told:
    """What a process tells when its rows are done, and what all tell together.

    plan: the row ids of each micro-batch; of several processes one after another, with an empty one between them.
    losses, norms, weights: of its micro-batches, as the step and `NormRecorder` have them. left_out: rows newly left
    out, of weight lost_weight. missing: which of the trained parameters have no gradient. reliefs: what saves memory,
    by process.
    """

    plan: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: tuple[float, ...]
    left_out: tuple[int, ...]
    lost_weight: float
    missing: tuple[int, ...]
    reliefs: tuple[tuple[str, ...], ...]


def left_weight(loss_weight: float, lost_weight: float) -> float:
    """N without the rows that were left out; 0 where nothing is left."""
    left = loss_weight - lost_weight
    return left if left > _NOTHING_FRACTION * loss_weight else 0.0


def sum_up(own: Told, gradients: Sequence[Tensor], shared: SharedStep) -> Told:
    """The gradients of all processes, in place, and what all have told. Where no target is left they stay as they are.

    Each process has divided by N without its own lost rows; what the others have lost is made up for here. gradients:
    none where they are summed already, as those of a sharded model are.
    """
    every = shared.peers.exchange(own)
    left = left_weight(shared.loss_weight, sum(each.lost_weight for each in every))
    if left == 0:
        return _together(every, [1.0] * len(every))
    factors = [left_weight(shared.loss_weight, each.lost_weight) / left for each in every]
    own_factor = left_weight(shared.loss_weight, own.lost_weight) / left
    if own_factor != 1:
        torch._foreach_mul_(list(gradients), own_factor)
    if gradients:
        shared.peers.sum(gradients)
    return _together(every, factors)


def _together(every: Sequence[Told], factors: Sequence[float]) -> Told:
    """factors: what each process's gradients were multiplied by; norms are squares."""
    plan = every[0].plan
    for each in every[1:]:
        plan = (*plan, (), *each.plan)
    pairs = list(zip(every, factors, strict=True))
    return Told(
        plan=plan,
        losses=tuple(loss * factor for each, factor in pairs for loss in each.losses),
        norms=tuple(norm * factor**2 for each, factor in pairs for norm in each.norms),
        weights=tuple(weight for each in every for weight in each.weights),
        left_out=tuple(sorted(row for each in every for row in each.left_out)),
        lost_weight=sum(each.lost_weight for each in every),
        missing=tuple(sorted(set.intersection(*(set(each.missing) for each in every)))),
        reliefs=tuple(names for each in every for names in each.reliefs),
    )
