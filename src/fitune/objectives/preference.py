"""Compute the losses of pairs of answers: DPO, SimPO and ORPO.

All of them are functions of the log-probabilities of the chosen and of the rejected answer. Shape
suffixes are those of `data/rows.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import ObjectiveName, PreferenceConfig
from fitune.data.rows import Answers, Judged, MicroBatch, Row
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.objectives.objective import Measured


@dataclass(frozen=True, slots=True)
class Preference(AnswerLogProbs):
    """Makes the chosen answer of each pair more likely than the rejected one (see `Objective`)."""

    name: ObjectiveName = "dpo"

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.means, torch.float64)

    @property
    def means(self) -> tuple[str, ...]:
        return ("chosen_reward", "rejected_reward", "margin", "pair_accuracy")

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return [5]: the sum of the losses of the pairs, and the sums of `means`."""
        # first, so that nothing of it is alive together with the graph
        reference_N = self.reference_log_probs(model, micro_batch, sweep="reference")
        log_probs_N = self.log_probs(model, micro_batch)
        losses_R, means_4R = self._judge(log_probs_N, reference_N, micro_batch)
        return torch.cat((losses_R.sum(0, keepdim=True), means_4R.sum(1)))

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return the loss of each pair, and the sums of `means`."""
        reference_N = self.reference_log_probs(model, micro_batch, sweep="eval_reference")
        log_probs_N = self.graphless_log_probs(model, micro_batch, head=self.head, sweep="eval")
        losses_R, means_4R = self._judge(log_probs_N, reference_N, micro_batch)
        weight_R = cast(Answers, micro_batch.answers).weights
        sums = means_4R.double().sum(1)
        return Measured(
            torch.stack((losses_R, weight_R)).double(),
            dict(zip(self.means, sums.unbind(), strict=True)),
        )

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

    def _judge(
        self, log_probs_N: Tensor, reference_N: Tensor | None, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair [R] with its graph, and its values of `means` [4, R].

        Both are 0 for a pair without targets.
        """
        pairs = cast(Answers, micro_batch.answers)
        weight_R, reference_R2 = pairs.weights, pairs.reference
        if reference_N is not None:
            reference_R2 = pairs.sum_by_sequence(reference_N * micro_batch.target_weights_N)
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
