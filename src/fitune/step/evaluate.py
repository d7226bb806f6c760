"""Sums what an objective measures over micro-batches, sample by sample."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitune.data.rows import MicroBatch
from fitune.model.evaluation_mode import evaluation_mode
from fitune.objectives.objective import Measured
from fitune.step.work import StepSettings


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of an evaluation, in the order of the sample ids, however samples were batched."""

    row_ids: tuple[int, ...]
    loss_weight: float
    #: what the objective sums over all samples, see `Objective.totals`
    totals: Mapping[str, float]
    num_supervised_tokens: int
    #: of each sample, not divided by its weight
    row_losses: tuple[float, ...]
    row_weights: tuple[float, ...]

    @property
    def loss_sum(self) -> float:
        return math.fsum(self.row_losses)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.loss_weight


def evaluate(
    model: nn.Module, micro_batches: Iterable[MicroBatch], *, settings: StepSettings
) -> EvalResult:
    """Evaluate the model in evaluation mode, and restore its own mode."""
    totals = EvalTotals(model, settings)
    with evaluation_mode(model):
        for micro_batch in micro_batches:
            totals.add(micro_batch)
    return totals.result()


class EvalTotals:
    """Sums over the micro-batches of an evaluation, which stay on the device until `result`."""

    def __init__(self, model: nn.Module, settings: StepSettings) -> None:
        self._model, self._settings = model, settings
        self._device = next(model.parameters()).device
        self._totals = {
            name: torch.zeros((), dtype=dtype, device=self._device)
            for name, dtype in settings.objective.totals.items()
        }
        self._row_ids: list[int] = []
        self._rows_KR: list[Tensor] = []
        self._loss_weight, self._num_supervised_tokens = 0.0, 0

    @torch.no_grad()
    def add(self, micro_batch: MicroBatch) -> None:
        """Add a micro-batch to the sums; if it fails, leave the sums unchanged."""
        here = micro_batch.to(self._device)
        measured = self._compute(here)
        for name, value in measured.totals.items():
            self._totals[name] += value
        self._rows_KR.append(measured.rows_KR)
        self._row_ids += micro_batch.row_ids
        self._loss_weight += micro_batch.loss_weight
        self._num_supervised_tokens += micro_batch.num_supervised_tokens

    @torch.no_grad()
    def pass_by(self, micro_batch: MicroBatch) -> None:
        """Compute a micro-batch without adding it to the sums."""
        self._compute(micro_batch.to(self._device))

    def _compute(self, here: MicroBatch) -> Measured:
        return self._settings.run(
            self._device, lambda: self._settings.objective.evaluate(self._model, here)
        )

    def result(self) -> EvalResult:
        none = torch.zeros((2, 0), dtype=torch.float64)
        host_KR = torch.cat(self._rows_KR, dim=1).cpu() if self._rows_KR else none
        order = sorted(range(len(self._row_ids)), key=self._row_ids.__getitem__)
        losses_R, totals = self._settings.objective.settle(host_KR[:, order])
        return EvalResult(
            row_ids=tuple(self._row_ids[place] for place in order),
            loss_weight=self._loss_weight,
            totals={name: total.item() for name, total in self._totals.items()} | dict(totals),
            num_supervised_tokens=self._num_supervised_tokens,
            row_losses=tuple(losses_R.tolist()),
            row_weights=tuple(host_KR[1, order].tolist()),
        )


def merge_evaluations(parts: Sequence[EvalResult]) -> EvalResult:
    """Merge evaluations of different samples into one."""
    if len(parts) == 1:
        return parts[0]
    rows = sorted(
        row
        for part in parts
        for row in zip(part.row_ids, part.row_losses, part.row_weights, strict=True)
    )
    row_ids, row_losses, row_weights = zip(*rows, strict=True) if rows else ((), (), ())
    return EvalResult(
        row_ids=row_ids,
        loss_weight=sum(part.loss_weight for part in parts),
        totals={name: sum(part.totals[name] for part in parts) for name in parts[0].totals},
        num_supervised_tokens=sum(part.num_supervised_tokens for part in parts),
        row_losses=row_losses,
        row_weights=row_weights,
    )
