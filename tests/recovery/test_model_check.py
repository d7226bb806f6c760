"""A model whose loss may not be computed in parts is named before the first step; the usual ones pass."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fitune.data.packing import lay_out
from fitune.data.rows import MicroBatch, Row
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.step.work import loss_share
from tiny_steps import labelled, make_model, settings_for

Part = dict[str, Tensor]
PROBE = ProbeSamples(
    labelled((3, 1), (12, 10)), labelled((3, 1)), labelled((12, 10)), labelled((3, 0)), 11.0
)


def by_forward(model: nn.Module) -> Any:
    return lambda part, weight: model(**part, num_items_in_batch=weight).loss


def check(model: nn.Module) -> Verdict:
    return check_model(model, by_forward(model), PROBE, mean_by="forward")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_transformers_own_models_pass(family: str) -> None:
    assert check(make_model(family).train()) == Verdict(True)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_our_own_loss_passes(family: str, packed: bool) -> None:
    model = make_model(family).train()
    rows = [row(0, 3, 1), row(1, 12, 10)]
    both, first, second, masked = (
        lay_out(rows, packed=packed), lay_out(rows[:1], packed=packed), lay_out(rows[1:], packed=packed),
        lay_out([row(0, 3, 0)], packed=packed),
    )  # fmt: skip
    settings = settings_for(model, "chunked")

    def share(part: MicroBatch, weight: float) -> Tensor:
        return loss_share(model, part, loss_weight=weight, settings=settings)

    assert check_model(
        model, share, ProbeSamples(both, first, second, masked, both.loss_weight)
    ) == Verdict(True)


def test_the_rounding_of_autocast_inside_of_the_forward_is_no_fault() -> None:
    model = make_model("llama").train()
    rows = [row(0, 3, 1), row(1, 12, 10)]
    both, first, second, masked = (
        lay_out(some, packed=True) for some in (rows, rows[:1], rows[1:], [row(0, 3, 0)])
    )
    settings = replace(settings_for(model, "chunked"), autocast=torch.bfloat16)

    def share(part: MicroBatch, weight: float) -> Tensor:
        return loss_share(model, part, loss_weight=weight, settings=settings)

    assert check_model(
        model, share, ProbeSamples(both, first, second, masked, both.loss_weight)
    ) == Verdict(True)


def row(row_id: int, num_tokens: int, num_targets: int) -> Row:
    weights = np.zeros(num_tokens, np.float32)
    weights[num_tokens - num_targets :] = 1
    return Row(row_id, np.arange(1, num_tokens + 1, dtype=np.int32), weights)


def test_a_forward_that_ignores_the_token_count_is_named() -> None:
    model = make_model()
    forward = model.forward
    model.forward = lambda *args, num_items_in_batch=None, **options: forward(*args, **options)  # type: ignore[method-assign]
    verdict = check(model)
    assert not verdict.exact
    assert "forward ignores the token count" in verdict.reason


def test_a_mean_of_means_is_named() -> None:
    model = make_model()
    verdict = check_model(model, lambda part, weight: model(**part).loss, PROBE)
    assert not verdict.exact
    assert "mean of means" in verdict.reason


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_named() -> None:
    model = make_model("mixtral")
    model.config.output_router_logits = True  # type: ignore[union-attr]
    model.config.router_aux_loss_coef = 0.1  # type: ignore[union-attr]
    model.router_aux_loss_coef = 0.1  # type: ignore[assignment]
    verdict = check(model)
    assert not verdict.exact
    assert verdict.reason.startswith("the auxiliary loss of a mixture of experts (0.")


class Small(nn.Module):
    """Targets are predicted by one layer over whatever `mix` makes of the embeddings."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(16, 8), mix, nn.Linear(8, 16)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: float, **_: Any
    ) -> Any:
        hidden = self.mix(self.embed(input_ids))
        targets = labels[:, 1:].flatten()
        losses = nn.functional.cross_entropy(
            self.head(hidden)[:, :-1].flatten(0, 1), targets, reduction="sum"
        )
        return SimpleNamespace(loss=losses / num_items_in_batch)


class OverRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


class Remembering(nn.Module):
    """A recurrent state that the last call left behind."""

    last: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        now = hidden + self.last
        self.last = now.mean().detach()
        return now


class Centred(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (OverRows(), "mixed by BatchNorm1d"),
        (Remembering(), "the model keeps a state"),
        (Centred(), "depend on each other"),
    ],
    ids=["batch norm", "hidden state", "rows centred"],
)
def test_a_model_that_cannot_be_cut_is_named(mix: nn.Module, reason: str) -> None:
    torch.manual_seed(0)
    verdict = check(Small(mix).train())
    assert not verdict.exact
    assert reason in verdict.reason


class Counting(nn.Module):
    """Its buffer changes in every forward and nothing depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden


def test_buffers_that_only_change_pass_and_are_said() -> None:
    torch.manual_seed(0)
    verdict = check(Small(Counting()).train())
    assert verdict == Verdict(
        True, "Counting change buffers in every forward, also when samples are only split"
    )


def test_a_loss_that_is_no_number_is_named() -> None:
    model = make_model()
    verdict = check_model(model, lambda part, weight: model(**part).loss * torch.nan, PROBE)
    assert verdict == Verdict(False, "the loss of two ordinary samples is nan")


def test_dropout_passes_and_is_said() -> None:
    torch.manual_seed(0)
    assert check(Small(nn.Dropout(0.5)).train()) == Verdict(
        True, "dropout draws other masks for another split"
    )
    assert check(Small(nn.Dropout(0.5)).eval()) == Verdict(True)


def test_a_masked_row_that_is_no_finite_zero_is_named() -> None:
    model = make_model()

    def share(part: Part, weight: float) -> Tensor:
        loss: Tensor = model(**part, num_items_in_batch=weight).loss
        return loss if (part["labels"] != -100).any() else loss * torch.nan

    verdict = check_model(model, share, PROBE)
    assert verdict == Verdict(False, "a sample without targets has the loss nan instead of 0")


def test_the_check_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = Small(OverRows()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    check(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.training
