"""Losses and gradients of pairs: those of the formulas, for every split, layout and form of the logits."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import ObjectiveName, PreferenceConfig
from fitune.data.packing import split
from fitune.data.rows import Batch, Judged, Row
from fitune.data.unpacking import rows_of
from fitune.model.head import Head, decoder_and_head
from fitune.objectives.log_probs import LiveReference
from fitune.objectives.preference import Preference
from fitune.step.evaluate import evaluate
from fitune.step.work import StepSettings, train_step
from tiny_steps import Capture, make_model

#: tokens of the chosen and the rejected sequence of each pair, and of their prompt
PAIRS = ((9, 14, 3), (5, 4, 2), (21, 8, 5), (6, 17, 4), (3, 3, 1))
SPLITS: tuple[dict[str, int], ...] = ({"micro_rows": 5}, {"micro_rows": 1}, {"micro_tokens": 30})


def pairs_batch() -> Batch:
    """Pairs of very unequal answers with made-up log-probabilities of a reference."""
    random = np.random.default_rng(0)
    rows = []
    for row_id, (chosen, rejected, prompt) in enumerate(PAIRS):
        weights = np.ones(chosen + rejected, np.float32)
        weights[:prompt] = weights[chosen : chosen + prompt] = 0
        ids = random.integers(0, 64, chosen + rejected, dtype=np.int32)
        reference = -4.0 * (chosen - prompt) + row_id, -4.0 * (rejected - prompt)
        rows.append(Row(row_id, ids, weights, Judged(chosen, reference)))
    return Batch(tuple(rows))


def answer_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of log-probabilities [R, 2] pair by pair, their numbers, and the reference's."""
    sums, counts = [], []
    for row in batch.rows:
        assert row.judged is not None
        for part in (slice(0, row.judged.chosen_tokens), slice(row.judged.chosen_tokens, None)):
            ids = torch.from_numpy(row.input_ids[part]).long()
            mask = torch.from_numpy(row.loss_weights[part][1:])
            log_probs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
            sums.append((log_probs.gather(1, ids[1:, None])[:, 0] * mask).sum())
            counts.append(mask.sum())
    reference = torch.tensor([row.judged.reference for row in batch.rows if row.judged])
    return torch.stack(sums).view(-1, 2), torch.stack(counts).view(-1, 2), reference


# The formulas of TRL 1.16 (DPOTrainer, CPOTrainer) and, for ORPO, of LLaMA-Factory, written down again.
def dpo(s: Tensor, n: Tensor, r: Tensor, c: PreferenceConfig) -> Tensor:
    chosen, rejected = (s - r).unbind(1)
    m = c.beta * (chosen - rejected)
    return {
        "sigmoid": -F.logsigmoid(m) * (1 - c.label_smoothing)
        - F.logsigmoid(-m) * c.label_smoothing,
        "robust": (
            -(1 - c.label_smoothing) * F.logsigmoid(m) + c.label_smoothing * F.logsigmoid(-m)
        )
        / (1 - 2 * c.label_smoothing),
        "hinge": torch.relu(1 - m),
        "ipo": (chosen / n[:, 0] - rejected / n[:, 1] - 1 / (2 * c.beta)) ** 2,
    }[c.loss_type]


def simpo(s: Tensor, n: Tensor, _: Tensor, c: PreferenceConfig) -> Tensor:
    chosen, rejected = (s / n).unbind(1)
    logits = chosen - rejected - c.simpo_gamma / c.beta
    return (
        -F.logsigmoid(c.beta * logits) * (1 - c.label_smoothing)
        - F.logsigmoid(-c.beta * logits) * c.label_smoothing
    )


def orpo(s: Tensor, n: Tensor, _: Tensor, c: PreferenceConfig) -> Tensor:
    chosen, rejected = (s / n).unbind(1)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - c.beta * F.logsigmoid(log_odds)


CASES: dict[str, tuple[ObjectiveName, PreferenceConfig, Callable[..., Tensor]]] = {
    "dpo": ("dpo", PreferenceConfig(), dpo),
    "dpo smoothed": ("dpo", PreferenceConfig(beta=0.3, label_smoothing=0.1), dpo),
    "robust": ("dpo", PreferenceConfig(loss_type="robust", label_smoothing=0.2), dpo),
    "hinge": ("dpo", PreferenceConfig(loss_type="hinge"), dpo),
    "ipo": ("dpo", PreferenceConfig(loss_type="ipo"), dpo),
    "simpo": ("simpo", PreferenceConfig(beta=2.0, label_smoothing=0.1), simpo),
    "orpo": ("orpo", PreferenceConfig(beta=0.2), orpo),
}


def objective_for(model: nn.Module, case: str, loss: str) -> Preference:
    head = decoder_and_head(model) if loss == "chunked" else None
    assert not isinstance(head, str), head
    name, settings, _ = CASES[case]
    return Preference(head, 8, name=name, settings=settings)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_formulas_for_every_split(case: str) -> None:
    batch, formula = pairs_batch(), CASES[case][2]
    for lora, tied in ((False, True), (True, False)) if case == "dpo" else ((False, False),):
        model = make_model(lora=lora, tied=tied)
        losses = formula(*answer_log_probs(model, batch), CASES[case][1])
        losses.mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None])
        model.zero_grad()
        for loss in ("full", "chunked"):
            settings = StepSettings(objective_for(model, case, loss), clip=0.0)
            for packed in (True, False):
                for sizes in SPLITS:
                    optimizer = Capture(model.parameters())
                    pieces = split(batch, packed=packed, **sizes)
                    result = train_step(model, optimizer, pieces, settings=settings)
                    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5)
                    error = (optimizer.vector() - wanted).norm() / wanted.norm()
                    assert error < 1e-5, (loss, packed, sizes)
                    found = evaluate(model, pieces, settings=settings)
                    assert found.row_losses == pytest.approx(losses.tolist(), rel=1e-5)
                    assert result.means == pytest.approx(
                        [found.totals[name] / len(PAIRS) for name in settings.objective.means],
                        rel=1e-5,
                    )


@pytest.mark.parametrize("kind", ["adapter_off", "frozen_copy"])
def test_a_reference_in_each_step_gives_the_loss_of_its_log_probabilities(kind: str) -> None:
    batch, model = pairs_batch(), make_model(lora=kind == "adapter_off", tied=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    with model.disable_adapter() if kind == "adapter_off" else nullcontext():
        reference = answer_log_probs(copied if kind == "frozen_copy" else model, batch)[0].detach()
    sums, counts, _ = answer_log_probs(model, batch)
    losses = dpo(sums, counts, reference, PreferenceConfig())
    losses.mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None])
    model.zero_grad()
    for loss in ("full", "chunked"):
        objective = objective_for(model, "dpo", loss)
        head = decoder_and_head(copied) if objective.head is not None else None
        assert not isinstance(head, str)
        live = LiveReference() if kind == "adapter_off" else LiveReference(copied, head)
        settings = StepSettings(replace(objective, reference=live), clip=0.0)
        for packed, sizes in product((True, False), SPLITS):
            optimizer = Capture(model.parameters())
            pieces = split(batch, packed=packed, **sizes)
            result = train_step(model, optimizer, pieces, settings=settings)
            assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5)
            assert (optimizer.vector() - wanted).norm() < 1e-5 * wanted.norm()
            found = evaluate(model, pieces, settings=settings)
            assert found.row_losses == pytest.approx(losses.tolist(), rel=1e-5)


def test_rewards_and_accuracy_are_those_of_the_answers() -> None:
    batch, model = pairs_batch(), make_model()
    sums, _, reference = answer_log_probs(model, batch)
    rewards = 0.1 * (sums - reference).detach()
    settings = StepSettings(objective_for(model, "dpo", "chunked"))
    found = evaluate(model, split(batch, packed=True, micro_rows=2), settings=settings)
    metrics = settings.objective.metrics(
        found.loss, found.totals, loss_weight=found.loss_weight, num_targets=1
    )
    assert metrics == pytest.approx(
        {
            "eval_chosen_reward": rewards[:, 0].mean().item(),
            "eval_rejected_reward": rewards[:, 1].mean().item(),
            "eval_pair_accuracy": (rewards[:, 0] > rewards[:, 1]).float().mean().item(),
            "eval_margin": (rewards[:, 0] - rewards[:, 1]).mean().item(),
        },
        rel=1e-4,
    )


def test_a_pair_is_never_parted() -> None:
    batch = pairs_batch()
    for packed in (True, False):
        for piece in split(batch, packed=packed, micro_tokens=1):
            assert len(piece.row_lengths) == 2 * len(piece.row_ids)
        (whole,) = split(batch, packed=packed, micro_rows=9)
        for row, again in zip(batch.rows, rows_of(whole), strict=True):
            assert again.judged == row.judged
            assert np.array_equal(again.input_ids, row.input_ids)
            assert np.array_equal(again.loss_weights, row.loss_weights)


def test_the_logits_of_all_tokens_never_exist_together() -> None:
    model, sizes = make_model(tied=False), []
    head = decoder_and_head(model)
    assert isinstance(head, Head)
    real = F.linear

    def measured(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == head.weight.shape[0] and weight.data_ptr() == head.weight.data_ptr():
            sizes.append(inputs.shape[0])
        return real(inputs, weight, bias)

    settings = StepSettings(objective_for(model, "dpo", "chunked"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch.nn.functional.linear", measured)
        pieces = split(pairs_batch(), packed=True, micro_rows=5)
        train_step(model, Capture(model.parameters()), pieces, settings=settings)
    assert max(sizes) == 8
    assert len(sizes) == 2 * -(-pairs_batch().num_supervised_tokens // 8)
