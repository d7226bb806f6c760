"""Compute the losses of pairs of answers: DPO, SimPO and ORPO.

All of them are functions of the log-probabilities of the chosen and of the rejected answer, which
are sums over the supervised tokens of an answer. These are computed a chunk of tokens at a time
(`chunked_log_probs`), so logits of all tokens never exist at the same time. Shape suffixes are
those of `data/rows.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import ObjectiveName, PreferenceConfig
from fitune.data.rows import Judged, MicroBatch, Pairs, Row
from fitune.model.head import Head
from fitune.model.tied_head import joined_to_embedding
from fitune.objectives.logits import (
    SupervisedTokens,
    add_head_gradients,
    compute_dtype_of,
    losses_and_gradient,
    supervised_hidden,
    supervised_logits,
    transform_logits,
)
from fitune.objectives.objective import Chunking, Measured, Sweep
from fitune.objectives.supervised import Supervised

#: number of tokens -> the chunks of them that a sweep computes
Chunks = Callable[[int, Sweep], Iterable[slice]]


@dataclass(frozen=True, slots=True)
class Preference(SupervisedTokens):
    """Makes the chosen answer of each pair more likely than the rejected one (see `Objective`)."""

    name: ObjectiveName = "dpo"
    settings: PreferenceConfig = PreferenceConfig()  # noqa: RUF009 (frozen)

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.means, torch.float64)

    @property
    def means(self) -> tuple[str, ...]:
        return ("chosen_reward", "rejected_reward", "margin", "pair_accuracy")

    @property
    def chunking(self) -> Chunking | None:
        if self.head is None:
            return None
        return Chunking(self.chunk_tokens, again=_trains_head(self.head))

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return [5]: the sum of the losses of the pairs, and the sums of `means`."""
        if self.head is None:
            log_probs_N = self._full_log_probs(model, micro_batch)
        else:
            with joined_to_embedding(self.head) as heads:
                hidden_ND = supervised_hidden(self.head, micro_batch)
            log_probs_N = chunked_log_probs(
                hidden_ND, heads[-1], micro_batch.target_ids_N, chunks=self.chunks
            )
        losses_R, means_4R = self._judge(log_probs_N, micro_batch)
        return torch.cat((losses_R.sum(0, keepdim=True), means_4R.sum(1)))

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return the loss of each pair, and the sums of `means`."""
        if self.head is None:
            log_probs_N = self._full_log_probs(model, micro_batch)
        else:
            hidden_ND = supervised_hidden(self.head, micro_batch)
            head = self.head.with_trained_rows()
            log_probs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
            for chunk in self.chunks(hidden_ND.shape[0], "eval"):
                logits_NV = head.logits(hidden_ND[chunk]).float()
                log_probs_N[chunk] = _log_probs(logits_NV, micro_batch.target_ids_N[chunk])
        losses_R, means_4R = self._judge(log_probs_N, micro_batch)
        sums = means_4R.double().sum(1)
        return Measured(losses_R, dict(zip(self.means, sums.unbind(), strict=True)))

    def as_supervised(self) -> Supervised:
        """Return what evaluates each sequence to minus its log-probability."""
        return Supervised(self.head, self.chunk_tokens)

    def metrics(
        self, loss: float, totals: Mapping[str, float], *, loss_weight: float, num_targets: int
    ) -> dict[str, float]:
        return {f"eval_{name}": totals[name] / loss_weight for name in self.means}

    def made_up_row(self, row_id: int, ids: npt.NDArray[np.integer], num_targets: int) -> Row:
        """Return a pair of two answers of equal length, with equally many targets."""
        chosen_tokens = len(ids) - len(ids) // 2
        weights = np.zeros(len(ids), np.float32)
        for first, end, count in (
            (0, chosen_tokens, num_targets - num_targets // 2),
            (chosen_tokens, len(ids), num_targets // 2),
        ):
            weights[max(first + 1, end - count) : end] = 1
        return Row(row_id, ids.astype(np.int32), weights, Judged(chosen_tokens))

    def _full_log_probs(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        logits_NV = supervised_logits(model, micro_batch)
        return -F.cross_entropy(logits_NV.float(), micro_batch.target_ids_N, reduction="none")

    def _judge(self, log_probs_N: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair [R] with its graph, and its values of `means` [4, R].

        Both are 0 for a pair without targets.
        """
        pairs = cast(Pairs, micro_batch.pairs)
        weight_R, reference_R2 = pairs.facts_R3[:, 0], pairs.facts_R3[:, 1:]
        sums_R2 = pairs.sum_by_sequence(log_probs_N * micro_batch.target_weights_N)
        counts_R2 = pairs.sum_by_sequence(micro_batch.target_weights_N).clamp(min=1)
        if self.name == "dpo":
            losses_R, rewards_R2 = dpo_losses(sums_R2 - reference_R2, counts_R2, self.settings)
        elif self.name == "simpo":
            losses_R, rewards_R2 = simpo_losses(sums_R2 / counts_R2, self.settings)
        else:
            losses_R, rewards_R2 = orpo_losses(sums_R2 / counts_R2, self.settings)
        chosen_R, rejected_R = rewards_R2.detach().unbind(1)
        margin_R = chosen_R - rejected_R
        means_4R = torch.stack((chosen_R, rejected_R, margin_R, (margin_R > 0).float()))
        return losses_R * weight_R, means_4R * weight_R


def dpo_losses(
    ratios_R2: Tensor, counts_R2: Tensor, settings: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """Return the losses of DPO [R] and the rewards of both answers [R, 2].

    ratios_R2: the log-probabilities of both answers minus those under the reference.
    counts_R2: the supervised tokens of both answers.

    `sigmoid` is Rafailov et al. 2023 (arXiv 2305.18290); with label_smoothing the conservative
    form, which `robust` unbiases (arXiv 2403.00409). `hinge` is SLiC's (arXiv 2305.10425), `ipo`
    that of arXiv 2310.12036 on means over tokens, as TRL has it.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    margin_R = beta * (ratios_R2[:, 0] - ratios_R2[:, 1])
    if settings.loss_type == "hinge":
        losses_R = torch.relu(1 - margin_R)
    elif settings.loss_type == "robust":
        right_R, wrong_R = F.softplus(-margin_R), F.softplus(margin_R)
        losses_R = ((1 - smoothing) * right_R - smoothing * wrong_R) / (1 - 2 * smoothing)
    elif settings.loss_type == "ipo":
        means_R2 = ratios_R2 / counts_R2
        losses_R = (means_R2[:, 0] - means_R2[:, 1] - 1 / (2 * beta)).square()
    else:
        losses_R = _smoothed(margin_R, smoothing)
    return losses_R, beta * ratios_R2


def simpo_losses(means_R2: Tensor, settings: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """Return the losses of SimPO [R] and the rewards of both answers [R, 2] (arXiv 2405.14734).

    means_R2: the mean log-probability of a token of each answer.
    """
    margin_R = settings.beta * (means_R2[:, 0] - means_R2[:, 1]) - settings.simpo_gamma
    return _smoothed(margin_R, settings.label_smoothing), settings.beta * means_R2


def orpo_losses(means_R2: Tensor, settings: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """Return the losses of ORPO [R] and the rewards of both answers [R, 2] (arXiv 2403.07691).

    The loss of imitating the chosen answer is the mean over its tokens, so it is one of the pair
    and does not depend on the other pairs.

    means_R2: the mean log-probability of a token of each answer.
    """
    # log(1 - exp(x)); x is 0 only where a token has all of the probability
    inverse_R2 = torch.log(-torch.expm1(means_R2.clamp(max=-1e-7)))
    odds_R2 = means_R2 - inverse_R2
    losses_R = F.softplus(odds_R2[:, 1] - odds_R2[:, 0])
    return settings.beta * losses_R - means_R2[:, 0], settings.beta * means_R2


def _smoothed(margin_R: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of a margin with labels that are wrong at this probability."""
    losses_R = F.softplus(-margin_R)
    if smoothing == 0:
        return losses_R
    return losses_R * (1 - smoothing) + F.softplus(margin_R) * smoothing


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
        ctx.dtype, ctx.job = compute_dtype_of(hidden_ND), job
        ctx.is_kept = not any(ctx.needs_input_grad[1:3])
        log_probs_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if ctx.is_kept else None
        product = _HeadProduct(hidden_ND, weight_VD, bias_V, head, ctx.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in job.chunks(hidden_ND.shape[0], "train"):
                _, logits_NV = product.logits(chunk)
                if grad_ND is None:
                    log_probs_N[chunk] = _log_probs(logits_NV, target_N[chunk])
                    # Free it before the next chunk's logits are allocated.
                    del logits_NV
                    continue
                down_N = logits_NV.new_full((len(logits_NV),), -1.0)
                losses_N, grad_NV = losses_and_gradient(logits_NV, target_N[chunk], down_N, head)
                log_probs_N[chunk] = losses_N.neg_()
                del logits_NV
                grad_NV = grad_NV.to(ctx.dtype)
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
        product = _HeadProduct(hidden_ND, weight_VD, bias_V, job.head, ctx.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in job.chunks(hidden_ND.shape[0], "backward"):
                part_ND, logits_NV = product.logits(chunk)
                _, grad_NV = losses_and_gradient(
                    logits_NV, job.target_N[chunk], factor_N[chunk].neg(), job.head
                )
                del logits_NV
                grad_NV = grad_NV.to(ctx.dtype)
                add_head_gradients(grad_NV, part_ND, weight_VD=grad_weight_VD, bias_V=grad_bias_V)
                if needs_hidden:
                    hidden_ND[chunk] = grad_NV @ product.weight_VD
                del grad_NV, part_ND
        grad_hidden_ND = hidden_ND if needs_hidden else None
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None


class _HeadProduct:
    """The head's logits of hidden states, in the dtype that a linear layer would compute in."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        dtype: torch.dtype,
    ) -> None:
        self._hidden_ND, self._head, self._dtype = hidden_ND, head, dtype
        self.weight_VD = weight_VD.to(dtype)
        self._bias_V = None if bias_V is None else bias_V.to(dtype)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return the hidden states of a chunk and its float32 logits, which may be overwritten."""
        part_ND = self._hidden_ND[chunk].to(self._dtype)
        raw_NV = F.linear(part_ND, self.weight_VD, self._bias_V).float()
        return part_ND, transform_logits(raw_NV, self._head)


def _log_probs(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return log softmax at the targets [N]. The logits are overwritten."""
    picked_N = logits_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    total_N = logits_NV.sub_(largest_N1).exp_().sum(-1)
    return picked_N - largest_N1.squeeze(1) - total_N.log()
