"""Describes what one optimizer step computes, and how far it has progressed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fitune.batch_size.norms import NormRecorder
from fitune.distributed.shared_step import StepReport
from fitune.step.gradients import ClippingPeers, CommitBuffer, missing_gradients_as_zeros

#: what a step was doing when it failed
Place = Literal["forward", "backward", "commit", "sum", "clip", "update", "evaluation", "elsewhere"]


class Piece(Protocol):
    """What one forward and backward computes: a micro-batch, or samples of a user's own batch."""

    @property
    def row_ids(self) -> tuple[int, ...]: ...

    @property
    def loss_weight(self) -> float: ...

    @property
    def num_positions(self) -> int:
        """The number of tokens, padding included."""
        ...


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class Survey(Generic[P]):
    """What a step computes of all its pieces before the first of them."""

    #: the sum over a piece's samples of what the loss depends on the mean of, without a graph
    measure: Callable[[P], Tensor]
    #: (that mean over the batch, piece, loss_weight) -> as `Work.loss_share`
    loss_share: Callable[[Tensor, P, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Work(Generic[P]):
    """What a step computes, and how its pieces are split."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    #: (piece, loss_weight) -> the piece's share of the mean loss of a batch of that weight, with
    #: its graph
    loss_share: Callable[[P, float], Tensor]
    #: (piece, most_positions) -> pieces of at most so many padded tokens, or of one sample
    split: Callable[[P, int], list[P]]
    #: (piece, row_ids) -> the piece without these samples, or None if no sample is left
    without: Callable[[P, Collection[int]], P | None]
    #: the largest gradient norm, 0 for no clipping
    clip: float
    #: sum the gradients of finished pieces in a buffer of their own, see `StepSettings.commit`
    commit: bool
    #: where the loss of a sample depends on the whole batch; a failed step then begins again
    survey: Survey[P] | None = None


class Peers(ClippingPeers, Protocol):
    """The processes that compute a step together, including this one; `Alone` is a single one."""

    @property
    def is_alone(self) -> bool: ...

    @property
    def go_back_together(self) -> bool:
        """Whether a failure in one process makes all of them begin the step again."""
        ...

    def loss_weight(self, own: float, lost: float) -> float:
        """Return the weight N that the losses are divided by.

        own: the weight of this process's pieces.
        lost: the weight of the samples that were left out.
        """
        ...

    def passes(self, work: Work[P], progress: "Progress[P]") -> Iterator[P]:
        """Yield the pieces that this process still has to compute."""
        ...

    def sum_up(self, progress: "Progress[P]") -> None:
        """Replace gradients, losses and norms by those of all processes."""
        ...


class Progress(Generic[P]):
    """The state of one optimizer step: finished and pending pieces, their losses and gradients."""

    def __init__(
        self, work: Work[P], pieces: Sequence[P], *, peers: Peers, norms: NormRecorder | None = None
    ) -> None:
        self.peers, self.norms = peers, norms
        self.model = work.model
        self.pending = list(pieces)
        self.done: list[P] = []
        #: each piece's share of the mean loss, on the device
        self.losses: list[Tensor] = []
        self.buffer = CommitBuffer(work.model) if work.commit else None
        self.place: Place = "forward"
        #: samples that do not fit alone and are left out of the step, and their loss weight
        self.left_out: set[int] = set()
        self.lost_weight = 0.0
        #: set when the processes begin to sum their gradients
        self.is_summed = False
        #: what all processes reported together, once they have summed
        self.total: StepReport | None = None
        self.loss_weight = self.remaining_weight()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def plan(self) -> tuple[tuple[int, ...], ...]:
        """The row ids of each finished piece, in order; after the sum, those of all processes."""
        return (
            tuple(piece.row_ids for piece in self.done) if self.total is None else self.total.plan
        )

    @property
    def is_one_piece(self) -> bool:
        """Whether the pending piece is the whole step, over all processes."""
        return len(self.pending) == 1 and not self.done and self.peers.is_alone

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The names of the fallbacks that this process has applied."""
        return ()

    def remaining_weight(self) -> float:
        return self.peers.loss_weight(
            sum(piece.loss_weight for piece in self.pending), self.lost_weight
        )

    def begin(self) -> P:
        """Return the piece that is computed next."""
        self.place = "forward"
        return self.pending[0]

    def finish(self, loss: Tensor) -> None:
        """Add the gradients of the computed piece to the step's."""
        self.place = "commit"
        if self.buffer is not None:
            self.buffer.add()
        self.losses.append(loss)
        self.done.append(self.pending.pop(0))
        if self.norms is not None:
            self.norms.keep(self.done[-1].loss_weight)

    def skip(self) -> None:
        """Count all pieces as done without computing them, because they have no target."""
        self.done, self.pending = self.done + self.pending, []

    def gradients(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """Give trained parameters without a gradient one of zeros.

        Returns the gradients of all trained parameters, and the places of the zeros.
        """
        return (
            missing_gradients_as_zeros(self.model) if self.buffer is None else self.buffer.filled()
        )

    def drop_gradients(self, places: Collection[int] | None = None) -> None:
        """Drop the gradient sums of the trained parameters at these places, or all gradients."""
        if places is None:
            for parameter in self.model.parameters():
                parameter.grad = None
        elif self.buffer is not None:
            self.buffer.drop(places)
        else:
            trained = [
                parameter for parameter in self.model.parameters() if parameter.requires_grad
            ]
            for place in places:
                trained[place].grad = None

    def take(self, total: StepReport) -> None:
        """Replace losses and norms by those of all processes."""
        self.total = total
        self.left_out |= set(total.left_out)
        self.loss_weight = self.peers.loss_weight(0.0, total.lost_weight)
        if self.loss_weight == 0:
            self.drop_gradients()
            return
        self.drop_gradients(total.missing)
        self.losses = list(torch.tensor(total.losses, device=self.device))
        if self.norms is not None:
            self.norms.take(total.norms, total.weights)

    def hand_over(self) -> None:
        """Move the buffer's sums to `.grad`, where the optimizer reads them."""
        if self.buffer is not None:
            self.buffer.hand_over()
