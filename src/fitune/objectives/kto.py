"""Compute the loss of answers that are desirable or not: KTO (arXiv 2402.01306).

The loss compares the log-ratio of an answer with an estimate of KL(model, reference) over the whole
batch: the mean log-ratio of prompts with the answers to others, not below 0. It has no gradient.
The formulas are those of TRL's KTOTrainer, whose estimate is over a micro-batch instead. Shape
suffixes are those of `data/rows.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fitune.config import PreferenceConfig
from fitune.data.rows import Answers, Labelled, MicroBatch, Row
from fitune.model.evaluation_mode import evaluation_mode
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.objectives.objective import Measured, Sweep


@dataclass(frozen=True, slots=True)
class KahnemanTversky(AnswerLogProbs):
    """Makes desirable answers more likely and others less likely (see `Objective`)."""

    #: the mean of the survey, a scalar on the device; None where no batch is known
    kl: Tensor | None = None

    @property
    def surveys(self) -> bool:
        return True

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        return {}

    @property
    def means(self) -> tuple[str, ...]:
        return ("desirable", "chosen_reward", "rejected_reward", "kl")

    def survey(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the log-ratios of the mismatched answers."""
        ratio_R = self._mismatched_ratio(model, micro_batch, ("survey", "survey_reference"))
        return (ratio_R * cast(Answers, micro_batch.answers).weights).sum()

    def knowing(self, mean: Tensor) -> Self:
        return replace(self, kl=mean)

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return [5]: the sum of the losses, and the sums of `means`."""
        answers = cast(Answers, micro_batch.answers)
        # first, so that nothing of it is alive together with the graph
        reference_N = self.reference_log_probs(model, micro_batch, sweep="reference")
        log_probs_N = self.log_probs(model, micro_batch)
        ratio_R = _ratio(log_probs_N, reference_N, micro_batch, answers.reference[:, 0])
        kl = ratio_R.new_zeros(()) if self.kl is None else self.kl
        losses_R = kto_losses(ratio_R, answers.desirable, kl, self.settings) * answers.weights
        values_4R = _rewards(ratio_R.detach(), answers.desirable, kl, self.settings.beta)
        sums_4 = (values_4R * answers.weights).sum(1)
        return torch.cat((losses_R.sum(0, keepdim=True), sums_4))

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return what `settle` needs of each sample, once the estimate of all is known."""
        answers = cast(Answers, micro_batch.answers)
        reference_N = self.reference_log_probs(model, micro_batch, sweep="eval_reference")
        log_probs_N = self.graphless_log_probs(model, micro_batch, head=self.head, sweep="eval")
        ratio_R = _ratio(log_probs_N, reference_N, micro_batch, answers.reference[:, 0])
        other_R = self._mismatched_ratio(
            model, micro_batch, ("eval_survey", "eval_survey_reference")
        )
        rows = (ratio_R, answers.weights, answers.desirable, other_R)
        return Measured(torch.stack(rows).double(), {})

    def settle(self, rows_KR: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        if len(rows_KR) < 4:
            return rows_KR[0], dict.fromkeys(self.means, 0.0)
        ratio_R, weight_R, desirable_R, other_R = rows_KR
        kl = (other_R * weight_R).sum() / weight_R.sum().clamp(min=1)
        losses_R = kto_losses(ratio_R, desirable_R, kl, self.settings) * weight_R
        values_4R = _rewards(ratio_R, desirable_R, kl, self.settings.beta)
        sums = (values_4R * weight_R).sum(1).tolist()
        return losses_R, dict(zip(self.means, sums, strict=True))

    def step_metrics(self, means: Sequence[float]) -> dict[str, float | None]:
        """Return the rewards of desirable answers and of others, their difference, and the KL."""
        desirable, chosen, rejected, kl = means
        both = 0 < desirable < 1
        chosen_reward = chosen / desirable if desirable > 0 else None
        rejected_reward = rejected / (1 - desirable) if desirable < 1 else None
        return {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "margin": chosen / desirable - rejected / (1 - desirable) if both else None,
            "kl": kl,
        }

    def metrics(
        self, loss: float, totals: Mapping[str, float], *, loss_weight: float, num_targets: int
    ) -> dict[str, float]:
        means = [totals[name] / loss_weight for name in self.means]
        found = self.step_metrics(means)
        return {f"eval_{name}": value for name, value in found.items() if value is not None}

    def made_up_row(self, row_id: int, ids: npt.NDArray[np.integer], num_targets: int) -> Row:
        """Return an answer, desirable in every other sample, which is its own mismatched one."""
        weights = np.zeros(len(ids), np.float32)
        weights[max(1, len(ids) - num_targets) :] = 1
        same = ids.astype(np.int32), weights
        return Row(row_id, *same, Labelled(row_id % 2 == 0, same))

    @torch.no_grad()
    def _mismatched_ratio(
        self, model: nn.Module, micro_batch: MicroBatch, sweeps: tuple[Sweep, Sweep]
    ) -> Tensor:
        """Return the log-ratio of each mismatched answer [R], without a graph.

        sweeps: that of the model, and that of a reference which is computed here too.
        """
        answers = cast(Answers, micro_batch.answers)
        assert answers.mismatched is not None
        here = answers.mismatched.to(micro_batch.input_ids_BS.device)
        reference_N = self.reference_log_probs(model, here, sweep=sweeps[1])
        with evaluation_mode(model):
            log_probs_N = self.graphless_log_probs(model, here, head=self.head, sweep=sweeps[0])
        return _ratio(log_probs_N, reference_N, here, answers.reference[:, 1])


def kto_losses(
    ratio_R: Tensor, desirable_R: Tensor, kl: Tensor, settings: PreferenceConfig
) -> Tensor:
    """Return the losses of KTO [R], weighted by whether an answer is desirable.

    ratio_R: the log-probability of each answer minus that under the reference.
    desirable_R: 1 of a desirable answer, 0 of another.
    kl: the mean log-ratio of mismatched answers.
    """
    margin_R = settings.beta * (ratio_R - kl.clamp(min=0))
    more = settings.desirable_weight - settings.undesirable_weight
    weight_R = desirable_R * more + settings.undesirable_weight
    return weight_R * torch.sigmoid(margin_R * (1 - 2 * desirable_R))


def _ratio(
    log_probs_N: Tensor, reference_N: Tensor | None, micro_batch: MicroBatch, kept_R: Tensor
) -> Tensor:
    """Return log-probabilities of answers minus those of a reference, here or kept [R]."""
    answers = cast(Answers, micro_batch.answers)
    sums_R = answers.sum_by_sequence(log_probs_N * micro_batch.target_weights_N)[:, 0]
    if reference_N is None:
        return sums_R - kept_R
    return sums_R - answers.sum_by_sequence(reference_N * micro_batch.target_weights_N)[:, 0]


def _rewards(ratio_R: Tensor, desirable_R: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Return for each sample what `KahnemanTversky.means` are the sums of [4, R]."""
    reward_R = beta * ratio_R
    values = (
        desirable_R,
        reward_R * desirable_R,
        reward_R * (1 - desirable_R),
        kl.clamp(min=0).expand_as(ratio_R),
    )
    return torch.stack([value.to(ratio_R.dtype) for value in values])
