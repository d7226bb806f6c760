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
from fitune.step.loss import LossSettings, loss_and_correct, token_loss_sum


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
    """loss_sum: weighted sum of token losses; num_correct: tokens predicted right, of num_supervised_tokens."""

    loss_sum: float
    loss_weight: float
    num_correct: int
    num_supervised_tokens: int

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
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    loss_weight, num_supervised_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for micro_batch in micro_batches:
            with autocast(device, settings.autocast):
                loss, correct = loss_and_correct(model, micro_batch.to(device), settings.loss)
            totals += torch.stack((loss.double(), correct.double()))
            loss_weight += micro_batch.loss_weight
            num_supervised_tokens += micro_batch.num_supervised_tokens
    finally:
        model.train(was_training)
    host = totals.cpu()
    return EvalResult(host[0].item(), loss_weight, int(host[1].item()), num_supervised_tokens)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
