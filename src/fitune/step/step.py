"""The optimizer step: the one function that goes from forward to update.

The same code trains, is recorded to predict memory, and is measured. `recovery.step.safe_step`
calls it again if memory runs out inside it. `Progress.peers` connects several processes; for a
single process it does nothing.

The loss of every piece is its sum of token losses divided by the weight N of the *whole* effective
batch, so the gradient does not depend on how the samples are split into micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fitune.batch_size.norms import GradientNorms
from fitune.step.gradients import Clipped, backward, clip_gradients, update
from fitune.step.progress import P, Progress, Survey, Work


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of an optimizer step."""

    #: mean over the loss weight N of the effective batch; None if the batch had no target (N = 0)
    loss: float | None
    #: of the whole gradient before clipping; None if the batch had no target
    grad_norm: float | None
    loss_weight: float
    #: False if the batch had no target, the gradient was not finite, or a float16 gradient
    #: overflowed
    updated: bool
    #: of each micro-batch's gradient, if a recorder was given
    norms: GradientNorms | None = None
    #: those of `Objective.means`, in its order: sums over the samples, divided by N
    means: tuple[float, ...] = ()


NOTHING_TO_LEARN = StepResult(loss=None, grad_norm=None, loss_weight=0.0, updated=False)


def optimizer_step(work: Work[P], progress: Progress[P]) -> StepResult:
    """Compute the gradient of the pending pieces, clip it, and update the parameters.

    `.grad` is None before and after. If the step raises, `progress.place` says how far it had come.
    Losses and norms are moved to the host in one transfer before the update, so that a gradient
    that is not finite never reaches the weights.
    """
    clipped = clipped_gradient(work, progress)
    if clipped is None:
        return NOTHING_TO_LEARN
    progress.peers.ready()
    progress.place = "update"
    updated = update(work.optimizer, clipped.grad_norm, scaler=work.scaler, protected=work.commit)
    return StepResult(
        clipped.loss,
        clipped.grad_norm,
        progress.loss_weight,
        updated,
        clipped.norms,
        clipped.means,
    )


def clipped_gradient(work: Work[P], progress: Progress[P]) -> Clipped | None:
    """Compute the gradient of the pending pieces over all processes, and clip it.

    Returns None if the pieces have no target.
    """
    accumulate(work, progress)
    progress.place = "sum"
    progress.peers.sum_up(progress)
    if progress.loss_weight == 0:
        return None
    progress.place = "clip"
    progress.hand_over()
    return clip_gradients(
        work.optimizer,
        progress.losses,
        max_norm=work.clip or math.inf,
        scaler=work.scaler,
        norms=progress.norms,
        peers=progress.peers,
    )


def accumulate(work: Work[P], progress: Progress[P]) -> None:
    """Compute forward and backward of each pending piece."""
    if progress.loss_weight == 0:
        progress.skip()
    loss_share = work.loss_share if work.survey is None else _surveyed(work.survey, progress)
    for piece in progress.peers.passes(work, progress):
        loss = loss_share(piece, progress.loss_weight)
        progress.place = "backward"
        loss = backward(loss, work.scaler, progress.norms, alone=progress.is_one_piece)
        progress.finish(loss)


def _surveyed(survey: Survey[P], progress: Progress[P]) -> Callable[[P, float], Tensor]:
    """Survey all pieces of the step, and return the share of a piece in the loss of this batch.

    All of them are pending: a step with a survey begins again as a whole.
    """
    progress.place = "forward"
    total: Tensor | None = None
    for number, piece in enumerate(progress.pending):
        try:
            found = survey.measure(piece)
        except Exception:
            # the first of the pending pieces counts as the one that failed
            progress.pending.insert(0, progress.pending.pop(number))
            raise
        total = found if total is None else total + found
    if total is None:
        total = torch.zeros((), device=progress.device)
    return partial(survey.loss_share, total / max(progress.loss_weight, 1.0))
