"""Compute the loss of a micro-batch: the weighted *sum* of its token losses.

The optimizer step divides that sum once, by the weight of the whole effective batch.

The `full` loss takes the model's own logits; tests compare the other one with it. The `chunked`
loss applies the head only at supervised tokens, a chunk of them at a time, and computes the
gradient in the same pass. Logits of all tokens therefore never exist at the same time. Shape
suffixes are those of `data/rows.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import exp
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import Auto, Loss
from fitune.data.rows import MicroBatch, Row
from fitune.errors import ModelError
from fitune.model.head import Head, decoder_and_head
from fitune.model.packed_attention import row_boundaries
from fitune.model.tied_head import joined_to_embedding
from fitune.objectives.objective import CHUNK_TOKENS, Chunking, Measured

#: The bytes of float32 logits that exist at the same time on a GPU, where a small vocabulary allows
#: larger chunks.
CHUNK_BYTES = 32 * 2**20
#: where even a single sample does not fit otherwise
SMALL_CHUNK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Supervised:
    """Minimises the weighted cross-entropy of the supervised tokens (see `Objective`)."""

    #: where the model's body ends and its logits begin; None for the model's own logits (`full`
    #: loss)
    head: Head | None = None
    #: supervised tokens whose logits exist at the same time, if there is a head
    chunk_tokens: int = CHUNK_TOKENS
    #: see `Objective.watched`
    watch: Callable[[list[slice], bool], Iterable[slice]] | None = None

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        return {"correct": torch.int64}

    @property
    def chunking(self) -> Chunking | None:
        return None if self.head is None else Chunking(self.chunk_tokens)

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the weighted sum of the token losses of a micro-batch, a float32 scalar."""
        if self.head is None:
            return _weighted_cross_entropy(_supervised_logits(model, micro_batch), micro_batch)
        with joined_to_embedding(self.head) as heads:
            hidden_ND = _supervised_hidden(self.head, micro_batch)
        chunks = self._chunks(hidden_ND.shape[0], evaluates=False)
        return chunked_cross_entropy(hidden_ND, heads[-1], micro_batch, chunks=chunks)

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return the losses, and how often the most likely token is the target."""
        target_N = micro_batch.target_ids_N
        if self.head is None:
            logits_NV = _supervised_logits(model, micro_batch)
            losses_N = F.cross_entropy(logits_NV.float(), target_N, reduction="none")
            losses_N = losses_N * micro_batch.target_weights_N
            return Measured(losses_N, {"correct": _num_correct(logits_NV, target_N)})
        hidden_ND = _supervised_hidden(self.head, micro_batch)
        losses_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        for chunk in self._chunks(hidden_ND.shape[0], evaluates=True):
            logits_NV = self.head.logits(hidden_ND[chunk])
            losses_N[chunk] = F.cross_entropy(logits_NV.float(), target_N[chunk], reduction="none")
            correct += _num_correct(logits_NV, target_N[chunk])
        return Measured(losses_N * micro_batch.target_weights_N, {"correct": correct})

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

    def smaller(self, model: nn.Module | None) -> tuple[Self, str] | None:
        """Return the loss in chunks of few tokens, unless it is that already."""
        if self.head is not None and self.chunk_tokens <= SMALL_CHUNK_TOKENS:
            return None
        head: Head | str | None = self.head
        if head is None and model is not None:
            head = decoder_and_head(model)
        if not isinstance(head, Head):
            return None
        return (
            replace(self, head=head, chunk_tokens=SMALL_CHUNK_TOKENS),
            f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time",
        )

    def watched(self, watch: Callable[[list[slice], bool], Iterable[slice]]) -> Self:
        return replace(self, watch=watch)

    def _chunks(self, num_tokens: int, *, evaluates: bool) -> Iterable[slice]:
        slices = Chunking(self.chunk_tokens).slices(num_tokens, evaluates=evaluates)
        return slices if self.watch is None else self.watch(slices, evaluates)


def choose_objective(
    model: nn.Module, *, loss: Loss | Auto, device: torch.device
) -> tuple[Supervised, str | None]:
    """Return the supervised objective for a model, and a note for the user.

    loss: whether the logits are computed in chunks; auto for where the model allows it.

    Raises ModelError if the model does not allow loss=chunked.
    """
    if loss == "full":
        return Supervised(), None
    head = decoder_and_head(model)
    if isinstance(head, Head):
        return Supervised(head, choose_chunk_tokens(head, device)), None
    if loss == "chunked":
        raise ModelError(f"loss=chunked does not fit this model: {head}; use loss=full")
    return Supervised(), f"full logits: {head}"


def choose_chunk_tokens(head: Head, device: torch.device) -> int:
    """Return the number of supervised tokens of a chunk.

    Small chunks leave a GPU waiting for kernel launches, but not a CPU.
    """
    of_card = CHUNK_BYTES // (4 * head.weight.shape[0])
    return CHUNK_TOKENS if device.type == "cpu" else max(CHUNK_TOKENS, of_card)


def chunked_cross_entropy(
    hidden_ND: Tensor, head: Head, micro_batch: MicroBatch, *, chunks: Iterable[slice]
) -> Tensor:
    """Return the weighted sum of the cross-entropies of `head.logits(hidden_ND)`, a float32 scalar.

    chunks: of the supervised tokens; only the logits of one chunk exist at the same time
    """
    loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head.weight,
        head.bias,
        micro_batch.target_ids_N,
        micro_batch.target_weights_N,
        head,
        chunks,
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
    ) -> Tensor:
        compute_dtype = _compute_dtype(hidden_ND)
        matmul_weight_VD = weight_VD.to(compute_dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in chunks:
                part_ND = hidden_ND[chunk].to(compute_dtype)
                bias = None if bias_V is None else bias_V.to(compute_dtype)
                logits_NV = _transform(F.linear(part_ND, matmul_weight_VD, bias).float(), head)
                losses_N, grad_NV = _losses_and_gradient(
                    logits_NV, target_N[chunk], weights_N[chunk], head
                )
                loss += losses_N @ weights_N[chunk]
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                del logits_NV
                grad_NV = grad_NV.to(compute_dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[chunk] = grad_NV @ matmul_weight_VD
                if grad_weight_VD is not None:
                    if compute_dtype == weight_VD.dtype:
                        grad_weight_VD.addmm_(grad_NV.T, part_ND)
                    else:
                        grad_weight_VD += grad_NV.T @ part_ND
                if grad_bias_V is not None:
                    grad_bias_V += grad_NV.sum(0)
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
        return (*grads, None, None, None, None)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in.

    Autocast does not act inside a custom autograd function, so it is queried here.
    """
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _transform(raw_NV: Tensor, head: Head) -> Tensor:
    """Apply to the product h @ weight.T + bias what `Head.logits` applies after it, in place."""
    if head.scale != 1:
        raw_NV.mul_(head.scale)
    return (
        raw_NV if head.soft_cap is None else raw_NV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    )


def _losses_and_gradient(
    logits_NV: Tensor, target_N: Tensor, weights_N: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies [N] and the gradient of their weighted sum.

    The gradient is that with respect to `raw_NV` of `_transform`: w * scale * (softmax - target) *
    (1 - tanh^2). The logits are overwritten.
    """
    target_N1 = target_N.unsqueeze(1)
    picked_N = logits_NV.gather(1, target_N1).squeeze(1)
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    slope_NV = (
        None if head.soft_cap is None else logits_NV.div(head.soft_cap).square_().neg_().add_(1)
    )
    grad_NV = logits_NV.sub_(largest_N1).exp_()
    total_N1 = grad_NV.sum(-1, keepdim=True)
    factor_N1 = (weights_N * head.scale).unsqueeze(1)
    grad_NV.mul_(factor_N1 / total_N1).scatter_add_(1, target_N1, -factor_N1)
    if slope_NV is not None:
        grad_NV.mul_(slope_NV)
    return (largest_N1 + total_N1.log()).squeeze(1) - picked_N, grad_NV


def _weighted_cross_entropy(logits_NV: Tensor, micro_batch: MicroBatch) -> Tensor:
    losses_N = F.cross_entropy(logits_NV.float(), micro_batch.target_ids_N, reduction="none")
    return losses_N @ micro_batch.target_weights_N


def _num_correct(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return (logits_NV.argmax(-1) == target_N).sum()


def _supervised_logits(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the model's own logits [N, V] at the supervised tokens."""
    logits_BSV = model(**_inputs(micro_batch)).logits
    return cast(Tensor, logits_BSV.flatten(0, 1).index_select(0, micro_batch.target_index_N))


def _supervised_hidden(head: Head, micro_batch: MicroBatch) -> Tensor:
    """Return the last hidden states [N, D] at the supervised tokens."""
    hidden_BSD = head.decoder(**_inputs(micro_batch)).last_hidden_state
    return cast(Tensor, hidden_BSD.flatten(0, 1).index_select(0, micro_batch.target_index_N))


def _inputs(micro_batch: MicroBatch) -> dict[str, object]:
    """Return the arguments of the model's forward, without an attention mask.

    Packed samples have boundaries instead, and causal attention never sees padding on the right.
    """
    inputs = {
        "input_ids": micro_batch.input_ids_BS,
        "position_ids": micro_batch.position_ids_BS,
        "use_cache": False,
    }
    if not micro_batch.packed:
        return inputs
    return inputs | {
        "row_boundaries": row_boundaries(
            micro_batch.row_lengths, device=micro_batch.input_ids_BS.device
        )
    }
