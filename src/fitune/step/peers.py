"""The processes of a step: one alone, several that each hold the model, or several that hold its shards."""

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
    """One process, which waits for nobody."""

    is_alone = True
    go_back_together = False
    rank = 0

    def exchange(self, value: T) -> list[T]:
        """Return what each process gave, in their order."""
        return [value]

    def loss_weight(self, own: float, lost: float) -> float:
        return own

    def passes(self, work: Work[P], progress: Progress[P]) -> Iterator[P]:
        while progress.pending:
            yield progress.begin()

    def sum_up(self, progress: Progress[P]) -> None:
        """The gradients of this process are those of the step."""

    def ready(self) -> None:
        """There is nobody to wait for."""

    def leave(self) -> None:
        """There is nobody to tell of a failure."""

    def take_back(self, progress: Progress[P]) -> None:
        """Drop what the failed attempt left on the model."""
        progress.drop_gradients()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


ALONE = Alone()


class SharedSamples(Alone):
    """Processes that each hold the whole model and compute their own samples of the batch.

    Each runs out of memory, splits and tries again by itself; they meet when all samples are done.
    """

    is_alone = False

    def __init__(self, ranks: ExchangePeers, loss_weight: float) -> None:
        """loss_weight: of the whole batch, without the samples that are left out already; the same in all."""
        self._ranks, self._loss_weight = ranks, loss_weight

    def loss_weight(self, own: float, lost: float) -> float:
        return remaining_weight(self._loss_weight, lost)

    def sum_up(self, progress: Progress[P]) -> None:
        """Allocate what this needs before the others hear of this process, so that it cannot fail after that."""
        gradients, missing = progress.gradients()
        report = _report(progress, missing)
        progress.is_summed = True
        progress.take(sum_gradients(report, gradients, self._ranks, self._loss_weight))


class ShardedModel(Alone):
    """Processes that hold the shards of one model (FSDP2). They compute every pass together and go back together."""

    is_alone = False
    go_back_together = True

    def __init__(
        self, shards: Shards, ranks: ExchangePeers | None = None, loss_weight: float = 0.0
    ) -> None:
        """ranks, loss_weight: as of `SharedSamples`. Without ranks all compute the same samples, in a trial."""
        self._shards, self._ranks, self._loss_weight = shards, ranks, loss_weight
        self.rank = shards.peers.rank

    def exchange(self, value: T) -> list[T]:
        return self._shards.peers.exchange(value)

    def loss_weight(self, own: float, lost: float) -> float:
        return own if self._ranks is None else remaining_weight(self._loss_weight, lost)

    def passes(self, work: Work[P], progress: Progress[P]) -> Iterator[P]:
        """A process without samples computes `Shards.idle`, whose gradient is zero, while others have some left."""
        while self._shards.more(bool(progress.pending)):
            if progress.pending:
                yield progress.begin()
            else:
                progress.place = "forward"
                backward(work.loss_share(cast("P", self._shards.idle), 1.0), work.scaler)

    def sum_up(self, progress: Progress[P]) -> None:
        """The backward has summed gradients already; losses and norms are still those of this process."""
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
    """Bring losses and norms to the host in one transfer, for the other processes."""
    none = torch.zeros(0, device=progress.device)
    norms, weights = (none, ()) if progress.norms is None else progress.norms.kept()
    losses = progress.losses
    host = torch.cat((torch.stack(losses).float(), norms) if losses else (norms,)).tolist()
    return StepReport(
        plan=progress.plan,
        losses=tuple(host[: len(losses)]),
        norms=tuple(host[len(losses) :]),
        weights=weights,
        left_out=tuple(sorted(progress.left_out)),
        lost_weight=progress.lost_weight,
        missing=missing,
        fallbacks=(progress.fallbacks,),
    )
