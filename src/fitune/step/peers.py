"""Implements `Peers`: for one process, for several with the whole model, and for several shards."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fitune.distributed.sharding import Shards
from fitune.distributed.shared_step import (
    ExchangePeers,
    StepReport,
    remaining_weight,
    sum_gradients,
)
from fitune.step.gradients import backward
from fitune.step.progress import P, Progress, Work

T = TypeVar("T")


class Alone:
    """A single process, which waits for no other."""

    is_alone = True
    go_back_together = False
    rank = 0

    def exchange(self, value: T) -> list[T]:
        """Return what each process passed, by rank."""
        return [value]

    def loss_weight(self, own: float, lost: float) -> float:
        return own

    def passes(self, work: Work[P], progress: Progress[P]) -> Iterator[P]:
        while progress.pending:
            yield progress.begin()

    def sum_up(self, progress: Progress[P]) -> None:
        """Do nothing: the gradients of this process are those of the step."""

    def ready(self) -> None:
        """Do nothing: there is no process to wait for."""

    def leave(self) -> None:
        """Do nothing: there is no process to notify of a failure."""

    def take_back(self, progress: Progress[P]) -> None:
        """Drop the gradients that the failed attempt left on the model."""
        progress.drop_gradients()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


ALONE = Alone()


class SharedSamples(Alone):
    """Processes that each have the whole model, and compute their own samples of the batch.

    Each one runs out of memory, splits and repeats independently. They wait for each other when all
    samples are done.
    """

    is_alone = False

    def __init__(self, ranks: ExchangePeers, loss_weight: float) -> None:
        """Create the peers of one step.

        loss_weight: of the whole batch without quarantined samples; the same in all processes.
        """
        self._ranks, self._loss_weight = ranks, loss_weight

    def loss_weight(self, own: float, lost: float) -> float:
        return remaining_weight(self._loss_weight, lost)

    def sum_up(self, progress: Progress[P]) -> None:
        """Sum gradients, losses and norms over the processes.

        What this needs is allocated before the others are notified, so that it cannot fail
        afterwards.
        """
        gradients, missing = progress.gradients()
        report = _report(progress, missing)
        progress.is_summed = True
        progress.take(sum_gradients(report, gradients, self._ranks, self._loss_weight))


class ShardedModel(Alone):
    """Processes that each have a shard of the model (FSDP2).

    They compute every pass together, and a failure in one makes all begin the step again.
    """

    is_alone = False
    go_back_together = True

    def __init__(
        self, shards: Shards, ranks: ExchangePeers | None = None, loss_weight: float = 0.0
    ) -> None:
        """Create the peers of one step.

        ranks, loss_weight: as in `SharedSamples`. Without ranks, all compute the same samples, as a
            trial.
        """
        self._shards, self._ranks, self._loss_weight = shards, ranks, loss_weight
        self.rank = shards.peers.rank

    def exchange(self, value: T) -> list[T]:
        return self._shards.peers.exchange(value)

    def loss_weight(self, own: float, lost: float) -> float:
        return own if self._ranks is None else remaining_weight(self._loss_weight, lost)

    def passes(self, work: Work[P], progress: Progress[P]) -> Iterator[P]:
        """Yield this process's pieces, as long as any process has some left.

        A process without pieces computes `Shards.idle`, whose gradient is zero.
        """
        while self._shards.more(bool(progress.pending)):
            if progress.pending:
                yield progress.begin()
            else:
                progress.place = "forward"
                backward(work.loss_share(cast("P", self._shards.idle), 1.0), work.scaler)

    def sum_up(self, progress: Progress[P]) -> None:
        """Sum losses and norms over the processes; the backward has summed the gradients."""
        if self._ranks is None:
            return
        report = _report(progress, missing=())
        self._shards.ready()
        progress.is_summed = True
        progress.take(sum_gradients(report, [], self._ranks, self._loss_weight))

    def ready(self) -> None:
        self._shards.ready()

    def leave(self) -> None:
        self._shards.leave()

    def take_back(self, progress: Progress[P]) -> None:
        self._shards.take_back()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        return self._shards.clip(parameters, max_norm)


def _report(progress: Progress[P], missing: tuple[int, ...]) -> StepReport:
    """Move losses and norms to the host in one transfer, to send them to the other processes."""
    none = torch.zeros(0, device=progress.device)
    norms, weights = (none, ()) if progress.norms is None else progress.norms.recorded()
    losses = progress.losses
    width = losses[0].numel() if losses else 1
    shares = torch.stack(losses).float().flatten() if losses else none
    host = torch.cat((shares, norms)).tolist()
    num_shares = len(losses) * width
    return StepReport(
        plan=progress.plan,
        losses=tuple(tuple(host[i : i + width]) for i in range(0, num_shares, width)),
        norms=tuple(host[num_shares:]),
        weights=weights,
        left_out=tuple(sorted(progress.left_out)),
        lost_weight=progress.lost_weight,
        missing=missing,
        fallbacks=(progress.fallbacks,),
    )
