"""Describes fitune's own training step: micro-batches, and the objective of the run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from fitune.batch_size.norms import NormRecorder
from fitune.data.rows import MicroBatch
from fitune.data.unpacking import split_again, without_rows
from fitune.distributed.sharding import Shards
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.objectives.objective import Objective
from fitune.step.peers import ALONE
from fitune.step.progress import Progress, Survey, Work
from fitune.step.step import StepResult, optimizer_step

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How fitune's own step computes loss and update."""

    objective: Objective
    #: the largest gradient norm; 0 for no clipping
    clip: float = 1.0
    #: the dtype of matrix products; None for that of the parameters
    autocast: torch.dtype | None = None
    #: Sum the gradients of finished micro-batches in a buffer of their own. Then a failed
    #: micro-batch is repeated alone, and the update can be undone; otherwise a failure begins the
    #: step again. For few trainable parameters.
    commit: bool = False
    #: if the model is sharded over several processes
    shards: Shards | None = None

    def of_reference(self) -> Self:
        """Return the settings of the pass that computes a reference which is kept.

        Each sequence is evaluated to minus its log-probability.
        """
        assert isinstance(self.objective, AnswerLogProbs)
        return replace(self, objective=self.objective.as_supervised())

    def run(self, device: torch.device, compute: Callable[[], T]) -> T:
        """Run `compute`, which uses the model, under these settings, and return its result."""
        with autocast(device, self.autocast):
            return compute() if self.shards is None else self.shards.run(compute)


def loss_share(
    model: nn.Module, micro_batch: MicroBatch, *, loss_weight: float, settings: StepSettings
) -> Tensor:
    """Return a micro-batch's share of the mean loss of a batch of `loss_weight`, with its graph."""
    device = next(model.parameters()).device
    here = micro_batch.to(device)
    return settings.run(device, lambda: settings.objective.loss_sum(model, here) / loss_weight)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def micro_batch_work(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Work[MicroBatch]:
    """Describe fitune's own step.

    scaler: for float16 autocast only.
    """
    return Work(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        loss_share=lambda micro_batch, loss_weight: loss_share(
            model, micro_batch, loss_weight=loss_weight, settings=settings
        ),
        split=split_again,
        without=without_rows,
        clip=settings.clip,
        commit=settings.commit,
        survey=_survey(model, settings) if settings.objective.surveys else None,
    )


def _survey(model: nn.Module, settings: StepSettings) -> Survey[MicroBatch]:
    def measure(micro_batch: MicroBatch) -> Tensor:
        device = next(model.parameters()).device
        here = micro_batch.to(device)
        return settings.run(device, lambda: settings.objective.survey(model, here))

    def share(mean: Tensor, micro_batch: MicroBatch, loss_weight: float) -> Tensor:
        known = replace(settings, objective=settings.objective.knowing(mean))
        return loss_share(model, micro_batch, loss_weight=loss_weight, settings=known)

    return Survey(measure, share)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    settings: StepSettings,
    scaler: torch.amp.GradScaler | None = None,
    norms: NormRecorder | None = None,
) -> StepResult:
    """Do one optimizer step on these micro-batches, without surviving a lack of memory."""
    work = micro_batch_work(model, optimizer, settings, scaler=scaler)
    return optimizer_step(work, Progress(work, micro_batches, peers=ALONE, norms=norms))
