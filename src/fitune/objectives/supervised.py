"""Compute the loss of a micro-batch: the weighted *sum* of its token losses.

The optimizer step divides that sum once, by the weight of the whole effective batch.

The `full` loss takes the model's own logits; tests compare the other one with it. The `chunked`
loss applies the head only at supervised tokens, a chunk of them at a time, and computes the
gradient in the same pass. Logits of all tokens therefore never exist at the same time. Shape
suffixes are those of `data/rows.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.data.rows import MicroBatch, Row
from fitune.model.head import Head
from fitune.model.tied_head import joined_to_embedding
from fitune.objectives.logits import (
    HeadProduct,
    SupervisedTokens,
    add_head_gradients,
    losses_and_gradient,
    supervised_hidden,
    supervised_logits,
)
from fitune.objectives.objective import Measured


@dataclass(frozen=True, slots=True)
class Supervised(SupervisedTokens):
    """Minimises the weighted cross-entropy of the supervised tokens (see `Objective`)."""

    #: see `losses_and_gradient`; an evaluation takes the plain cross-entropy
    label_smoothing: float = 0.0

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        return {"correct": torch.int64}

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the weighted sum of the token losses of a micro-batch, a float32 scalar."""
        if self.head is None:
            logits_NV = supervised_logits(model, micro_batch)
            return _weighted_cross_entropy(logits_NV, micro_batch, self.label_smoothing)
        with joined_to_embedding(self.head) as heads:
            hidden_ND = supervised_hidden(self.head, micro_batch)
        chunks = self.chunks(hidden_ND.shape[0], "train")
        return chunked_cross_entropy(
            hidden_ND,
            heads[-1],
            micro_batch,
            chunks=chunks,
            label_smoothing=self.label_smoothing,
        )

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return the losses, and how often the most likely token is the target."""
        target_N = micro_batch.target_ids_N
        if self.head is None:
            logits_NV = supervised_logits(model, micro_batch)
            losses_N = F.cross_entropy(logits_NV.float(), target_N, reduction="none")
            losses_N = losses_N * micro_batch.target_weights_N
            correct = _num_correct(logits_NV, target_N)
            return Measured(_by_row(losses_N, micro_batch), {"correct": correct})
        hidden_ND = supervised_hidden(self.head, micro_batch)
        head = self.head.with_trained_rows()
        losses_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        for chunk in self.chunks(hidden_ND.shape[0], "eval"):
            logits_NV = head.logits(hidden_ND[chunk])
            losses_N[chunk] = F.cross_entropy(logits_NV.float(), target_N[chunk], reduction="none")
            correct += _num_correct(logits_NV, target_N[chunk])
        losses_N = losses_N * micro_batch.target_weights_N
        return Measured(_by_row(losses_N, micro_batch), {"correct": correct})

    def metrics(
        self, loss: float, totals: Mapping[str, float], *, loss_weight: float, num_targets: int
    ) -> dict[str, float]:
        return {
            "eval_perplexity": exp(min(loss, 700.0)),  # exp(710) overflows a double
            "eval_accuracy": totals["correct"] / num_targets,
        }

    def made_up_row(self, row_id: int, ids: npt.NDArray[np.integer], num_targets: int) -> Row:
        weights = np.zeros(len(ids), np.float32)
        weights[max(1, len(ids) - num_targets) :] = 1
        return Row(row_id, ids.astype(np.int32), weights)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head: Head,
    micro_batch: MicroBatch,
    *,
    chunks: Iterable[slice],
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the weighted sum of the cross-entropies of `head.logits(hidden_ND)`, a float32 scalar.

    chunks: of the supervised tokens; only the logits of one chunk exist at the same time
    label_smoothing: see `losses_and_gradient`
    """
    loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head.weight,
        head.bias,
        micro_batch.target_ids_N,
        micro_batch.target_weights_N,
        head,
        chunks,
        label_smoothing,
    )
    return cast(Tensor, loss)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradient in one pass over chunks of tokens.

    This is possible because whatever follows changes the gradient of the sum by one factor only.
    The fused losses of Liger and Apple's CCE (arXiv 2411.09009) do the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        weights_N: Tensor,
        head: Head,
        chunks: Iterable[slice],
        label_smoothing: float,
    ) -> Tensor:
        product = HeadProduct(hidden_ND, weight_VD, bias_V, head)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in chunks:
                part_ND, logits_NV = product.logits(chunk)
                losses_N, grad_NV = losses_and_gradient(
                    logits_NV,
                    target_N[chunk],
                    weights_N[chunk],
                    head,
                    label_smoothing=label_smoothing,
                )
                loss += losses_N @ weights_N[chunk]
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                del logits_NV
                grad_NV = grad_NV.to(product.dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[chunk] = grad_NV @ product.weight_VD
                add_head_gradients(grad_NV, part_ND, weight_VD=grad_weight_VD, bias_V=grad_bias_V)
                # Free it before the next chunk's logits are allocated.
                del grad_NV
        ctx.save_for_backward(
            *(t for t in (grad_hidden_ND, grad_weight_VD, grad_bias_V) if t is not None)
        )
        ctx.present = tuple(t is not None for t in (grad_hidden_ND, grad_weight_VD, grad_bias_V))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = grad_outputs
        saved = iter(ctx.saved_tensors)
        # In place: only this function has these tensors, and there is no double backward.
        grads = [next(saved).mul_(factor) if present else None for present in ctx.present]
        return (*grads, None, None, None, None, None)


def _weighted_cross_entropy(
    logits_NV: Tensor, micro_batch: MicroBatch, label_smoothing: float
) -> Tensor:
    losses_N = F.cross_entropy(
        logits_NV.float(),
        micro_batch.target_ids_N,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses_N @ micro_batch.target_weights_N


def _by_row(losses_N: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the weighted loss and the weight of each sample, float64 [2, R]."""
    return micro_batch.sum_by_row(torch.stack((losses_N, micro_batch.target_weights_N)))


def _num_correct(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return (logits_NV.argmax(-1) == target_N).sum()
