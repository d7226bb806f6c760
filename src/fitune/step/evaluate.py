"""Computes loss and accuracy over micro-batches, sample by sample."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from fitune.data.rows import MicroBatch
from fitune.objectives.supervised import losses_and_correct
from fitune.step.work import StepSettings


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of an evaluation, in the order of the sample ids, however samples were batched."""

    row_ids: tuple[int, ...]
    loss_weight: float
    #: tokens predicted correctly, of `num_supervised_tokens`
    num_correct: int
    num_supervised_tokens: int
    #: of each sample, the weighted sum of its tokens' losses
    row_losses: tuple[float, ...]
    #: of each sample, the sum of its tokens' loss weights
    row_weights: tuple[float, ...]

    @property
    def loss_sum(self) -> float:
        return math.fsum(self.row_losses)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.loss_weight

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a double

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_supervised_tokens


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
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._row_ids: list[int] = []
        self._sums_2R = [torch.zeros((2, 0), dtype=torch.float64, device=self._device)]
        self._loss_weight, self._num_supervised_tokens = 0.0, 0

    @torch.no_grad()
    def add(self, micro_batch: MicroBatch) -> None:
        """Add a micro-batch to the sums; if it fails, leave the sums unchanged."""
        here = micro_batch.to(self._device)
        losses_N, num_correct = self._compute(here)
        sums_2R = sum_by_row(torch.stack((losses_N, here.target_weights_N)), here)
        self._correct += num_correct
        self._sums_2R.append(sums_2R)
        self._row_ids += micro_batch.row_ids
        self._loss_weight += micro_batch.loss_weight
        self._num_supervised_tokens += micro_batch.num_supervised_tokens

    @torch.no_grad()
    def pass_by(self, micro_batch: MicroBatch) -> None:
        """Compute a micro-batch without adding it to the sums."""
        self._compute(micro_batch.to(self._device))

    def _compute(self, here: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._settings.run(
            self._device, lambda: losses_and_correct(self._model, here, self._settings.loss)
        )

    def result(self) -> EvalResult:
        host = torch.cat(self._sums_2R, dim=1).cpu()
        order = sorted(range(len(self._row_ids)), key=self._row_ids.__getitem__)
        row_losses, row_weights = host[:, order].tolist()
        return EvalResult(
            row_ids=tuple(self._row_ids[place] for place in order),
            loss_weight=self._loss_weight,
            num_correct=int(self._correct.item()),
            num_supervised_tokens=self._num_supervised_tokens,
            row_losses=tuple(row_losses),
            row_weights=tuple(row_weights),
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
        num_correct=sum(part.num_correct for part in parts),
        num_supervised_tokens=sum(part.num_supervised_tokens for part in parts),
        row_losses=row_losses,
        row_weights=row_weights,
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def sum_by_row(values_KN: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """Sum K values of each target over the targets of each sample, in float64: [K, samples]."""
    num_rows = len(micro_batch.row_ids)
    widths = (
        micro_batch.row_lengths
        if micro_batch.packed
        else (micro_batch.input_ids_BS.shape[1],) * num_rows
    )
    ends_R = torch.tensor(list(accumulate(widths)), device=values_KN.device)
    row_N = torch.bucketize(micro_batch.target_index_N, ends_R, right=True)
    sums_KR = values_KN.new_zeros((len(values_KN), num_rows), dtype=torch.float64)
    return sums_KR.index_add_(1, row_N, values_KN.double())
