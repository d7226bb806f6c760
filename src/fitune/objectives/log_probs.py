"""Compute the log-probabilities of supervised tokens a chunk at a time, and those of a reference.

Every objective of preferences is a function of the log-probability of an answer, the sum over its
supervised tokens. Logits of all tokens never exist at the same time. Shape suffixes are those of
`data/rows.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import PreferenceConfig
from fitune.data.rows import MicroBatch
from fitune.model.evaluation_mode import evaluation_mode
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
from fitune.objectives.objective import Chunking, Sweep
from fitune.objectives.supervised import Supervised

#: number of tokens -> the chunks of them that a sweep computes
Chunks = Callable[[int, Sweep], Iterable[slice]]


@dataclass(frozen=True, slots=True)
class LiveReference:
    """What computes the log-probabilities under the reference anew in each step."""

    #: the frozen copy of the model; None for the trained model without its adapters
    copy: nn.Module | None = None
    #: that of the copy, where the logits are computed in chunks
    head: Head | None = None

    @contextmanager
    def models(
        self, model: nn.Module, head: Head | None
    ) -> Iterator[tuple[nn.Module, Head | None]]:
        """Yield the reference and its head; inside, nothing else may use the trained model."""
        if self.copy is not None:
            yield self.copy, self.head
            return
        with evaluation_mode(model), model.disable_adapter():  # type: ignore[operator]
            yield model, head


@dataclass(frozen=True, slots=True)
class AnswerLogProbs(SupervisedTokens):
    """Where an objective of preferences gets the log-probabilities of answers (see `Objective`)."""

    settings: PreferenceConfig = PreferenceConfig()  # noqa: RUF009 (frozen)
    #: None where the samples hold the reference's log-probabilities, and where there is none
    reference: LiveReference | None = None

    @property
    def chunking(self) -> Chunking | None:
        if self.head is None:
            return None
        return Chunking(
            self.chunk_tokens,
            again=_trains_head(self.head),
            has_reference=self.reference is not None,
            surveys=self.surveys,
        )

    def as_supervised(self) -> Supervised:
        """Return what evaluates each sequence to minus its log-probability."""
        return Supervised(self.head, self.chunk_tokens, self.watch)

    def log_probs(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the log-probabilities of the targets, float32 [N], with their graph."""
        if self.head is None:
            logits_NV = supervised_logits(model, micro_batch)
            return -F.cross_entropy(logits_NV.float(), micro_batch.target_ids_N, reduction="none")
        with joined_to_embedding(self.head) as heads:
            hidden_ND = supervised_hidden(self.head, micro_batch)
        return chunked_log_probs(hidden_ND, heads[-1], micro_batch.target_ids_N, chunks=self.chunks)

    def graphless_log_probs(
        self, model: nn.Module, micro_batch: MicroBatch, *, head: Head | None, sweep: Sweep
    ) -> Tensor:
        """Return the log-probabilities of the targets, float32 [N], in a pass without a graph."""
        if head is None:
            logits_NV = supervised_logits(model, micro_batch)
            return -F.cross_entropy(logits_NV.float(), micro_batch.target_ids_N, reduction="none")
        hidden_ND = supervised_hidden(head, micro_batch)
        head = head.with_trained_rows()
        log_probs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        for chunk in self.chunks(hidden_ND.shape[0], sweep):
            logits_NV = head.logits(hidden_ND[chunk]).float()
            log_probs_N[chunk] = log_probs_of(logits_NV, micro_batch.target_ids_N[chunk])
        return log_probs_N

    @torch.no_grad()
    def reference_log_probs(
        self, model: nn.Module, micro_batch: MicroBatch, *, sweep: Sweep
    ) -> Tensor | None:
        """Return the reference's log-probabilities of the targets, float32 [N].

        Returns None where they are not computed in each step.
        """
        if self.reference is None:
            return None
        with self.reference.models(model, self.head) as (reference, head):
            return self.graphless_log_probs(reference, micro_batch, head=head, sweep=sweep)


def chunked_log_probs(hidden_ND: Tensor, head: Head, target_N: Tensor, *, chunks: Chunks) -> Tensor:
    """Return log softmax(head.logits(hidden_ND)) at the targets, float32 [N], with its graph.

    chunks: only the logits of one chunk exist at the same time
    """
    log_probs_N = _ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight, head.bias, _Job(head, target_N, chunks)
    )
    return cast(Tensor, log_probs_N)


def _trains_head(head: Head) -> bool:
    trains_weight = head.output.weight.requires_grad or head.rows is not None
    return trains_weight or (head.bias is not None and head.bias.requires_grad)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is computed, but for the tensors that may have a gradient."""

    head: Head
    target_N: Tensor
    chunks: Chunks


class _ChunkedLogProbs(torch.autograd.Function):
    """Computes the log-probabilities of targets and their gradient over chunks of tokens.

    The factor of a token's gradient follows from the log-probabilities of its whole pair, so it is
    not known in the forward. Where the head is not trained, the forward keeps the gradient of each
    token's hidden state, which the backward multiplies. Where the head is trained, the gradient of
    its weight is a sum over tokens with different factors, and the backward computes the logits
    again; it then writes the gradient over the hidden states, so neither way takes more memory than
    the loss of supervised tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        job: _Job,
    ) -> Tensor:
        head, target_N = job.head, job.target_N
        ctx.job = job
        ctx.is_kept = not any(ctx.needs_input_grad[1:3])
        log_probs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if ctx.is_kept else None
        product = HeadProduct(hidden_ND, weight_VD, bias_V, head)
        # autocast does not act in the backward
        ctx.dtype = product.dtype
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in job.chunks(hidden_ND.shape[0], "train"):
                _, logits_NV = product.logits(chunk)
                if grad_ND is None:
                    log_probs_N[chunk] = log_probs_of(logits_NV, target_N[chunk])
                    # Free it before the next chunk's logits are allocated.
                    del logits_NV
                    continue
                down_N = logits_NV.new_full((len(logits_NV),), -1.0)
                losses_N, grad_NV = losses_and_gradient(logits_NV, target_N[chunk], down_N, head)
                log_probs_N[chunk] = losses_N.neg_()
                del logits_NV
                grad_NV = grad_NV.to(product.dtype)
                grad_ND[chunk] = grad_NV @ product.weight_VD
                del grad_NV
        if grad_ND is None:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        else:
            ctx.save_for_backward(grad_ND)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor_N,) = grad_outputs
        # In place: only this function has these tensors, and there is no double backward.
        if ctx.is_kept:
            (grad_ND,) = ctx.saved_tensors
            return grad_ND.mul_(factor_N.unsqueeze(1)), None, None, None
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        job: _Job = ctx.job
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        product = HeadProduct(hidden_ND, weight_VD, bias_V, job.head, ctx.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in job.chunks(hidden_ND.shape[0], "backward"):
                part_ND, logits_NV = product.logits(chunk)
                _, grad_NV = losses_and_gradient(
                    logits_NV, job.target_N[chunk], factor_N[chunk].neg(), job.head
                )
                del logits_NV
                grad_NV = grad_NV.to(product.dtype)
                add_head_gradients(grad_NV, part_ND, weight_VD=grad_weight_VD, bias_V=grad_bias_V)
                if needs_hidden:
                    hidden_ND[chunk] = grad_NV @ product.weight_VD
                del grad_NV, part_ND
        grad_hidden_ND = hidden_ND if needs_hidden else None
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None


def log_probs_of(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return log softmax at the targets [N]. The logits are overwritten."""
    picked_N = logits_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    total_N = logits_NV.sub_(largest_N1).exp_().sum(-1)
    return picked_N - largest_N1.squeeze(1) - total_N.log()
