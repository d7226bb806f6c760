"""THE training step: forward and backward over micro-batches, clip, update. It is trained, evaluated against and
recorded for the memory prediction; there is no second one.

The loss of every micro-batch is its sum of token losses divided by the weight N of the *whole* effective batch, so the
gradient does not depend on how the rows are split. One transfer to the host, before the update, so that a gradient that
is not finite never reaches the weights.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fitune.data.rows import MicroBatch
from fitune.step.loss import LossSettings, losses_and_correct, token_loss_sum


@dataclass(frozen=True, slots=True)
class StepSettings:
    """clip: the largest gradient norm, 0 for none. autocast: the dtype of matrix products, None for the parameters'."""

    loss: LossSettings
    clip: float = 1.0
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean over the loss weight N of the effective batch. grad_norm: before clipping.

    updated is False when the batch had no target (N = 0), the gradient was not finite, or a float16 gradient overflowed
    and the scaler lowers its scale; `loss` is None in the first case.
    """

    loss: float | None
    grad_norm: float | None
    loss_weight: float
    updated: bool


@dataclass(frozen=True, slots=True)
class EvalResult:
    """num_correct: tokens predicted right, of num_supervised_tokens. row_losses, row_weights: the weighted sum of token
    losses and the sum of weights of each row, in the order of the row ids, however the rows were laid out."""

    loss_weight: float
    num_correct: int
    num_supervised_tokens: int
    row_losses: tuple[float, ...]
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


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    settings: StepSettings,
    scaler: torch.amp.GradScaler | None = None,
) -> StepResult:
    """One optimizer step on one effective batch, given as its micro-batches.

    `.grad` is None before and after. scaler: for float16 autocast only.
    """
    loss_weight = sum(micro_batch.loss_weight for micro_batch in micro_batches)
    if loss_weight == 0:
        return StepResult(loss=None, grad_norm=None, loss_weight=0.0, updated=False)
    device = next(model.parameters()).device
    losses = []
    for micro_batch in micro_batches:
        with autocast(device, settings.autocast):
            loss = token_loss_sum(model, micro_batch.to(device), settings.loss) / loss_weight
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
        losses.append(loss.detach())
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm_tensor = nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    host = torch.stack((torch.stack(losses).sum(), grad_norm_tensor.float())).cpu()
    mean_loss, grad_norm = host[0].item(), host[1].item()
    updated = math.isfinite(grad_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=mean_loss, grad_norm=grad_norm, loss_weight=loss_weight, updated=updated)


@torch.no_grad()
def evaluate(model: nn.Module, micro_batches: Iterable[MicroBatch], *, settings: StepSettings) -> EvalResult:
    """Loss and token accuracy over micro-batches, in evaluation mode; the model's own mode is restored."""
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    row_ids: list[int] = []
    sums_2R: list[torch.Tensor] = []
    loss_weight, num_supervised_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for micro_batch in micro_batches:
            with autocast(device, settings.autocast):
                here = micro_batch.to(device)
                losses_N, num_correct = losses_and_correct(model, here, settings.loss)
            correct += num_correct
            sums_2R.append(sum_by_row(torch.stack((losses_N, here.target_weights_N)), here))
            row_ids += micro_batch.row_ids
            loss_weight += micro_batch.loss_weight
            num_supervised_tokens += micro_batch.num_supervised_tokens
    finally:
        model.train(was_training)
    host = torch.cat(sums_2R, dim=1).cpu()
    order = sorted(range(len(row_ids)), key=row_ids.__getitem__)
    row_losses, row_weights = host[:, order].tolist()
    num_right = int(correct.item())
    return EvalResult(loss_weight, num_right, num_supervised_tokens, tuple(row_losses), tuple(row_weights))


def sum_by_row(values_KN: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """K values of each target -> their float64 sums over the targets of each row [K, rows]."""
    num_rows = len(micro_batch.row_ids)
    widths = micro_batch.row_lengths if micro_batch.packed else (micro_batch.input_ids_BS.shape[1],) * num_rows
    ends_R = torch.tensor(widths, device=values_KN.device).cumsum(0)
    row_N = torch.bucketize(micro_batch.target_index_N, ends_R, right=True)
    sums_KR = values_KN.new_zeros((len(values_KN), num_rows), dtype=torch.float64)
    return sums_KR.index_add_(1, row_N, values_KN.double())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
