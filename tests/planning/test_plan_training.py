"""What a plan says of the optimizer: every setting in steps and in tokens, and which of them do nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.cli.plan_training import training_lines, training_warnings
from fitune.config import read_config
from fitune.language import say
from fitune.language.chinese import CHINESE
from fitune.planning.limits import Lengths, find_lengths
from fitune.planning.optimizer_facts import PlannedTraining, lost_updates_fraction, plan_training
from fitune.training.prepare import rows_notes

LENGTHS = Lengths((100, 300), 0.4, 0, 6_000, 1_200_000, "the longest sample of the data")
UNKNOWN = Lengths((2048,), 1.0, 0, None, None, "data.max_length")


def planned(
    lengths: Lengths = LENGTHS,
    *,
    precision: str = "float32",
    method: str = "full",
    optim: dict[str, Any] | None = None,
    **train: Any,
) -> PlannedTraining:
    sections = {"batch": {"effective": 6}, "optim": {"lr": 3e-5, **(optim or {})}, "train": train}
    model = {"source": "tiny", "method": method}
    config = read_config({"model": model, "data": {"train": "x.jsonl"}, **sections}).config
    return plan_training(config, lengths, precision=precision)


def text(training: PlannedTraining) -> str:
    return "\n".join(
        (
            *(f"{title} {line}" for title, line in training_lines(training)),
            *training_warnings(training),
        )
    )


@pytest.mark.parametrize(
    ("train", "steps"),
    [({}, 1000), ({"epochs": 2}, 2000), ({"steps": 70}, 70), ({"tokens": 120_000}, 100)],
)
def test_the_length_is_told_in_steps_and_in_tokens(train: dict[str, Any], steps: int) -> None:
    length = planned(**train).length
    assert length is not None
    assert (length.steps, length.tokens) == (steps, steps * 1200)


def test_a_gradient_counts_half_after_the_half_life() -> None:
    training = planned()
    for beta, span in zip(training.optim.betas, training.half_lives, strict=True):
        assert beta**span.steps == pytest.approx(0.5)
        assert span.tokens == pytest.approx(span.steps * 1200)


def test_an_optimizer_without_betas_has_no_half_lives() -> None:
    assert planned(optim={"name": "sgd"}).half_lives == ()
    assert "beta" not in text(planned(optim={"name": "sgd"}))


def test_the_shrinking_is_what_adamw_does_to_a_weight_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    training = planned(optim={"lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "warmup": 0})
    assert training.shrink_fraction == pytest.approx(1 - weight.item(), rel=1e-3)


def test_a_schedule_shrinks_less_than_its_highest_rate() -> None:
    constant, cosine = (
        planned(optim={"schedule": name}).shrink_fraction for name in ("constant", "cosine")
    )
    assert constant is not None
    assert cosine == pytest.approx(constant / 2, rel=0.05)


@pytest.mark.parametrize("lr", [1e-5, 3e-5, 6e-5, 3e-4])
def test_the_updates_that_bfloat16_loses_are_those_that_it_loses(lr: float) -> None:
    weights = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    kept = (weights - torch.where(weights > 0, lr, -lr).bfloat16()) != weights
    assert lost_updates_fraction(lr) == pytest.approx(1 - kept.float().mean().item(), abs=0.02)


def test_a_rule_changes_the_whole_tuple() -> None:
    training = planned(optim={"scaling": "sqrt", "reference_batch": 3})
    assert training.optim.lr == pytest.approx(3e-5 * math.sqrt(2))
    assert training.half_lives[1].tokens == pytest.approx(math.log(0.5) / math.log(0.999) * 600)


def test_everything_stands_in_the_heading() -> None:
    assert text(planned(optim={"weight_decay": 10})) == (
        "training 1,000 steps = 1.2 M tokens · 40% supervised · rate 3e-05 · cosine · "
        "warm-up 30 steps = 36.0 k tokens\n"
        " beta1 0.9 halves in 6.6 steps = 7.9 k tokens · beta2 0.999 halves in 693 steps = 831.4 k tokens · "
        "weight decay 10 takes 13.93% in all · clip 1"
    )


def test_what_is_not_known_is_not_guessed() -> None:
    said = text(planned(UNKNOWN))
    assert said.startswith("training rate 3e-05 · cosine\n beta1 0.9 halves in")
    assert "· weight decay 0.01 · clip 1" in said


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (planned(steps=99), "warning: only 99 optimizer steps, under 100"),
        (planned(steps=100), "note: 100 optimizer steps"),
        (
            planned(precision="bfloat16"),
            "warning: weights in bfloat16 lose at least 70% of the updates at a rate of 3e-05",
        ),
        (planned(), "note: weight decay 0.01 is inert: it takes 0.01% off"),
    ],
)
def test_what_does_nothing_or_harm_is_said(training: PlannedTraining, words: str) -> None:
    assert any(words in sentence for sentence in training_warnings(training))


def test_a_setting_that_works_is_not_warned_of() -> None:
    assert list(training_warnings(planned(epochs=1, optim={"weight_decay": 10}))) == []
    high = planned(epochs=1, precision="bfloat16", optim={"weight_decay": 10, "lr": 1e-3})
    assert high.lost_updates_fraction is not None
    assert list(training_warnings(high)) == []


def test_adapters_beside_bfloat16_weights_lose_no_updates() -> None:
    """They are float32 (model/precision.py)."""
    training = planned(precision="bfloat16", method="lora")
    assert training.lost_updates_fraction is None
    assert "bfloat16" not in "".join(training_warnings(training))


def test_it_is_said_in_chinese_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    said = text(planned(steps=50, precision="bfloat16"))
    assert all(
        word in said
        for word in ("训练", "半衰期", "警告：只有 50 个优化步", "权重衰减 0.01 不起作用")
    )
    assert "steps" not in said


def rows_said(num_rows: int, num_held_out: int, *overrides: str) -> list[str]:
    config = read_config(None, ["model.source=m", "data.train=a", *overrides]).config
    return list(
        rows_notes(
            num_rows=num_rows,
            num_held_out=num_held_out,
            rows_per_step=config.batch.rows_per_step,
            is_split=config.data.eval is None,
        )
    )


def test_a_batch_of_more_rows_than_there_are_is_said() -> None:
    (sentence,) = rows_said(393, 30, "batch.effective=1000")
    assert sentence.startswith(
        "batch.effective 1,000 is more than the 393 samples of the data: a step takes all of them"
    )


def test_so_few_held_out_rows_that_they_tell_nothing_are_said() -> None:
    (sentence,) = rows_said(298, 2)
    assert sentence.startswith("2 of 300 samples are held out")
    assert sentence.endswith("data.eval_fraction=0.13 holds out about 40")
    assert rows_said(59, 1)[0].endswith("data.eval_fraction=0.2 holds out about 12")


@pytest.mark.parametrize(
    ("num_rows", "num_held_out", "overrides"),
    [(2970, 30, ()), (30, 2, ()), (300, 0, ("data.eval_fraction=0",)), (300, 2, ("data.eval=b",))],
)
def test_what_is_as_asked_or_cannot_be_better_is_not_said(
    num_rows: int, num_held_out: int, overrides: tuple[str, ...]
) -> None:
    assert rows_said(num_rows, num_held_out, *overrides) == []


def test_both_are_said_in_chinese_where_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert [sentence[:16] for sentence in rows_said(298, 2, "batch.effective=1000")] == [
        "batch.effective ", "300 个样本中只留出 2 个样",
    ]  # fmt: skip


def test_a_plan_that_does_not_read_the_data_says_why(tmp_path: Path) -> None:
    here = tmp_path / "rows.jsonl"
    here.write_text('{"text": "a"}\n')

    def origin(data: str, source: str = "minimind2") -> str:
        return find_lengths(
            read_config(None, [f"model.source={source}", f"data.train={data}"]).config
        ).origin

    assert origin("none") == "data.max_length"
    assert origin("gone.jsonl") == "data.max_length, as the data is not here"
    assert (
        origin(str(here)) == "data.max_length, as the model has no tokenizer to read the data with"
    )
    assert say(origin(str(here))) in (origin(str(here)), CHINESE[origin(str(here))])
