"""fitune's own training step as the work of a `safe_step`: micro-batches, the loss of the configuration, and what may
be given up for memory."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from fitune.config import Recompute
from fitune.data.rows import MicroBatch
from fitune.data.unpacking import split_again, without_rows
from fitune.model.recompute import recomputable_layers, set_recompute
from fitune.step.safe_step import Relief, Work
from fitune.step.train_step import StepSettings, loss_share

SMALL_CHUNK_TOKENS = 32


def micro_batch_work(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Work[MicroBatch]:
    return Work(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        loss_share=lambda micro_batch, loss_weight: loss_share(
            model, micro_batch, loss_weight=loss_weight, settings=settings
        ),
        split=split_again,
        without=without_rows,
        clip=settings.clip,
        commit=settings.commit,
    )


def allowed_reliefs(
    model: nn.Module, settings: StepSettings, *, recompute: Recompute | Literal["auto"]
) -> list[Relief[MicroBatch]]:
    """What saves memory, changes no gradient, and was left open: recomputation where model.recompute is auto, and a
    loss in smaller chunks."""
    reliefs: list[Relief[MicroBatch]] = []
    layers = recomputable_layers(model)
    if recompute == "auto" and not all(layer.gradient_checkpointing for layer in layers):
        reliefs.append(Relief("model.recompute=full", _recompute))
    if settings.loss.head is not None and settings.loss.chunk_tokens > SMALL_CHUNK_TOKENS:
        smaller = replace(settings, loss=replace(settings.loss, chunk_tokens=SMALL_CHUNK_TOKENS))
        reliefs.append(
            Relief(
                f"a loss of {SMALL_CHUNK_TOKENS} positions at a time",
                lambda work: replace(
                    micro_batch_work(work.model, work.optimizer, smaller, scaler=work.scaler), clip=work.clip
                ),
            )
        )
    return reliefs


def _recompute(work: Work[MicroBatch]) -> Work[MicroBatch]:
    set_recompute(work.model, "full")
    return work
