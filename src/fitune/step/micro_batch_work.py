"""fitune's own training step as the work of a `safe_step`: micro-batches, the loss of the configuration, and what may
be given up for memory."""

from dataclasses import replace

import torch
from torch import nn

from fitune.config import Auto, Loss, Recompute
from fitune.data.rows import MicroBatch
from fitune.data.unpacking import split_again, without_rows
from fitune.model.head import Head, decoder_and_head
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
    shards = settings.shards
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
        shards=shards,
        idle_share=None
        if shards is None
        else lambda: loss_share(model, shards.idle, loss_weight=1.0, settings=settings),
    )


def allowed_reliefs(
    model: nn.Module, settings: StepSettings, *, recompute: Recompute | Auto, loss: Loss | Auto
) -> list[Relief[MicroBatch]]:
    """What saves memory, changes no gradient, and was left open by these keys of the configuration.

    recompute=auto: every layer is recomputed, and at last what that starts from is kept in the host's memory. loss: in
    small chunks, where it is in chunks already or auto."""
    reliefs: list[Relief[MicroBatch]] = []
    layers = recomputable_layers(model)
    may_recompute = recompute == "auto" and bool(layers)
    if may_recompute and not all(layer.gradient_checkpointing for layer in layers):
        reliefs.append(Relief("model.recompute=full", _recompute))
    head = settings.loss.head
    is_open = head is None and loss == "auto" and settings.shards is None  # a sharded model is not tried on its own
    found = decoder_and_head(model) if is_open else head
    if isinstance(found, Head) and (head is None or settings.loss.chunk_tokens > SMALL_CHUNK_TOKENS):
        smaller = replace(settings, loss=replace(settings.loss, head=found, chunk_tokens=SMALL_CHUNK_TOKENS))
        reliefs.append(
            Relief(
                f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time",
                lambda work: replace(
                    micro_batch_work(work.model, work.optimizer, smaller, scaler=work.scaler), clip=work.clip
                ),
            )
        )
    if may_recompute and next(model.parameters()).device.type != "cpu" and settings.shards is None:
        reliefs.append(Relief("model.offload_activations=true", _offload))
    return reliefs


def _recompute(work: Work[MicroBatch]) -> Work[MicroBatch]:
    set_recompute(work.model, "full")
    return work


def _offload(work: Work[MicroBatch]) -> Work[MicroBatch]:
    set_recompute(work.model, "full", offload=True)
    return work
