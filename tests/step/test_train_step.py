"""One gradient for one effective batch, however it is split, laid out and computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fitune.config import FreezeConfig, LoraConfig
from fitune.data.packing import split
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.model.freeze import freeze
from fitune.model.head import Head, decoder_and_head
from fitune.objectives.supervised import Supervised
from fitune.step.evaluate import evaluate
from fitune.step.step import StepResult
from fitune.step.work import StepSettings, train_step
from tiny_models import TINY
from tiny_steps import (
    MASKED_ROW,
    Capture,
    distance,
    make_batch,
    make_model,
    plain_gradient,
    settings_for,
)


def gradient(
    model: nn.Module, micro_batches: list[MicroBatch], loss: str
) -> tuple[torch.Tensor, StepResult]:
    capture = Capture(model.parameters())
    result = train_step(model, capture, micro_batches, settings=settings_for(model, loss))
    return capture.vector(), result


SPLITS = {
    "one": {"micro_rows": 7},
    "rows of 1": {"micro_rows": 1},
    "rows of 2": {"micro_rows": 2},
    "rows of 3": {"micro_rows": 3},
    "40 tokens": {"micro_tokens": 40},
    "64 tokens": {"micro_tokens": 64},
}


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (True, False),
        (False, False),
        (True, True),
        (True, LoraConfig(rank=4, dora=True, init="pissa")),
        (True, LoraConfig(rank=4, modules_to_save=("embed_tokens",))),
        (False, LoraConfig(rank=4, modules_to_save=("lm_head", "norm"))),
    ],
    ids=["tied", "untied", "lora", "dora of pissa", "tied embedding too", "head and norm too"],
)
def test_the_gradient_is_that_of_plain_transformers_for_every_split(
    tied: bool, lora: bool | LoraConfig, packed: bool, loss: str
) -> None:
    model, batch = make_model(tied=tied, lora=lora), make_batch()
    expected, expected_loss = plain_gradient(model, batch)
    for name, how in SPLITS.items():
        found, result = gradient(model, split(batch, packed=packed, **how), loss)
        assert distance(found, expected) < 1e-6, name
        assert result.loss == pytest.approx(expected_loss, rel=1e-6), name


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_new_tokens_have_one_gradient_too(tied: bool, loss: str) -> None:
    model, batch = make_model(tied=tied, lora=True, new_ids=(5, 6, 9)), make_batch()
    assert isinstance(decoder_and_head(model), Head)
    expected, expected_loss = plain_gradient(model, batch)
    for name, how in SPLITS.items():
        found, result = gradient(model, split(batch, packed=True, **how), loss)
        assert distance(found, expected) < 1e-6, name
        assert result.loss == pytest.approx(expected_loss, rel=1e-6), name


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_the_trained_layers_beside_frozen_ones_have_one_gradient_too(loss: str) -> None:
    model, batch = make_model(tied=False), make_batch()
    freeze(model, FreezeConfig(trained_layers=-1, extra_modules=("lm_head",)))
    expected, _ = plain_gradient(model, batch)
    for name, how in SPLITS.items():
        found, _ = gradient(model, split(batch, packed=True, **how), loss)
        assert distance(found, expected) < 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_smoothed_labels_have_the_gradient_of_transformers_for_every_split(family: str) -> None:
    """The reference is `LabelSmoother` on the whole padded batch, here also with capped logits."""
    model, batch = make_model(family), make_batch()
    expected, expected_loss = plain_gradient(model, batch, label_smoothing=0.2)
    for loss in ("full", "chunked"):
        settings = settings_for(model, loss)
        smoothed = replace(settings, objective=replace(settings.objective, label_smoothing=0.2))
        for name in ("one", "rows of 2"):
            for packed in (True, False) if family == "llama" else (False,):
                capture = Capture(model.parameters())
                micro_batches = split(batch, packed=packed, **SPLITS[name])
                result = train_step(model, capture, micro_batches, settings=smoothed)
                assert distance(capture.vector(), expected) < 1e-6, (loss, name, packed)
                assert result.loss == pytest.approx(expected_loss, rel=1e-6)


def test_six_by_four_and_four_by_six_are_one_gradient() -> None:
    """24 rows in the splits that people ask about."""
    model = make_model()
    batch = Batch(tuple(row for seed in range(4) for row in make_batch(seed).rows)[:24])
    expected, _ = gradient(model, split(batch, packed=True, micro_rows=24), "chunked")
    for micro_rows in (6, 4, 1):
        found, _ = gradient(model, split(batch, packed=True, micro_rows=micro_rows), "chunked")
        assert distance(found, expected) < 1e-5, micro_rows


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2", "gemma2", "gemma3"]
)
def test_the_chunked_loss_has_the_gradient_of_full_logits_in_every_family(family: str) -> None:
    model, batch = make_model(family, tied=TINY[family].tie_word_embeddings), make_batch()
    micro_batches = split(batch, packed=False, micro_rows=3)
    expected, _ = gradient(model, micro_batches, "full")
    found, _ = gradient(model, micro_batches, "chunked")
    assert distance(found, expected) < 1e-5


def test_a_mean_of_means_would_be_noticed() -> None:
    """The usual `loss / accumulation_steps` is far off, so the tests above can fail."""
    model, batch = make_model(), make_batch()
    expected, _ = plain_gradient(model, batch)
    micro_batches = [part for part in split(batch, packed=True, micro_rows=2) if part.loss_weight]
    parts = [gradient(model, [part], "full")[0] for part in micro_batches]
    assert distance(torch.stack(parts).mean(0), expected) > 0.05


def test_loss_weights_weigh_tokens() -> None:
    batch = make_batch()
    doubled = Batch(
        tuple(
            Row(r.row_id, r.input_ids, r.loss_weights * (2 if r.row_id == 1 else 1))
            for r in batch.rows
        )
    )
    model = make_model()
    one = gradient(model, split(doubled, packed=True, micro_rows=7), "chunked")[0]
    two = gradient(model, split(doubled, packed=False, micro_rows=2), "full")[0]
    plain = gradient(model, split(batch, packed=True, micro_rows=7), "chunked")[0]
    assert distance(one, two) < 1e-6
    assert distance(one, plain) > 0.01


def test_a_batch_without_targets_changes_nothing() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    masked = Batch((make_batch().rows[MASKED_ROW],))
    result = train_step(
        model,
        optimizer,
        split(masked, packed=True, micro_rows=1),
        settings=settings_for(model, "full"),
    )
    assert result == StepResult(loss=None, grad_norm=None, loss_weight=0.0, updated=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.no_grad():
        next(model.parameters())[5] = torch.inf
    batch = make_batch()
    before = [parameter.clone() for parameter in model.parameters()]
    result = train_step(
        model,
        optimizer,
        split(batch, packed=True, micro_rows=7),
        settings=settings_for(model, "full"),
    )
    assert not result.updated
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_clipping_bounds_the_gradient_of_the_whole_batch_and_reports_the_norm_before_it() -> None:
    model, batch = make_model(), make_batch()
    expected, _ = plain_gradient(model, batch)
    capture = Capture(model.parameters())
    micro_batches = split(batch, packed=True, micro_rows=2)
    result = train_step(
        model, capture, micro_batches, settings=settings_for(model, "chunked", clip=0.1)
    )
    assert result.grad_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert float(capture.vector().norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_evaluation_gives_loss_and_accuracy_of_the_plain_model_and_leaves_it_training(
    loss: str,
) -> None:
    model, batch = make_model(), make_batch()
    model.train()
    _, expected_loss = plain_gradient(model, batch)
    settings = settings_for(model, loss)
    result = evaluate(model, split(batch, packed=False, micro_rows=2), settings=settings)
    assert result.loss == pytest.approx(expected_loss, rel=1e-6)
    assert model.training
    correct = 0
    for row in batch.rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64)).unsqueeze(0)
        first_choice = model(input_ids=ids).logits[0, :-1].argmax(-1)
        correct += int(
            ((first_choice == ids[0, 1:]) & torch.from_numpy(row.loss_weights[1:] > 0)).sum()
        )
    assert result.totals == {"correct": correct}
    assert result.num_supervised_tokens == batch.num_supervised_tokens


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_gives_the_loss_of_each_row_however_rows_are_laid_out(
    loss: str, packed: bool
) -> None:
    model, batch = make_model(), make_batch()
    shuffled = Batch(tuple(reversed(batch.rows)))
    result = evaluate(
        model, split(shuffled, packed=packed, micro_rows=3), settings=settings_for(model, loss)
    )
    rows = sorted(batch.rows, key=lambda row: row.row_id)
    weights = [row.loss_weights.sum() for row in rows]
    expected = [
        w and plain_gradient(model, Batch((row,)))[1] * w
        for row, w in zip(rows, weights, strict=True)
    ]
    assert result.row_losses == pytest.approx(expected, rel=1e-5)
    assert result.row_weights == pytest.approx(weights)


def test_bfloat16_autocast_keeps_a_float32_loss_close_to_float32() -> None:
    model, batch = make_model(), make_batch()
    expected, expected_loss = plain_gradient(model, batch)
    head = decoder_and_head(model)
    assert isinstance(head, Head)
    capture = Capture(model.parameters())
    settings = StepSettings(Supervised(head, chunk_tokens=8), 0.0, torch.bfloat16)
    result = train_step(model, capture, split(batch, packed=True, micro_rows=2), settings=settings)
    assert result.loss == pytest.approx(expected_loss, rel=1e-2)
    assert distance(capture.vector(), expected) < 2e-2
