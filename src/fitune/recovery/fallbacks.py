"""Lists the ways to save memory if a single sample does not fit. None of them changes the gradient."""

from dataclasses import replace

from torch import nn

from fitune.config import Auto, Loss, Recompute
from fitune.data.rows import MicroBatch
from fitune.model.head import Head, decoder_and_head
from fitune.model.recompute import recomputable_layers, set_recompute
from fitune.recovery.protection import Fallback
from fitune.step.progress import Work
from fitune.step.work import StepSettings, micro_batch_work

SMALL_CHUNK_TOKENS = 32


def allowed_fallbacks(
    model: nn.Module, settings: StepSettings, *, recompute: Recompute | Auto, loss: Loss | Auto
) -> list[Fallback[MicroBatch]]:
    """List the fallbacks that these keys of the configuration leave open.

    recompute=auto allows gradient checkpointing of every layer and, as the last resort, moving the
    checkpointed inputs to the host's memory. loss=auto, or a chunked loss, allows smaller chunks.
    """
    fallbacks: list[Fallback[MicroBatch]] = []
    layers = recomputable_layers(model)
    may_recompute = recompute == "auto" and bool(layers)
    if may_recompute and not all(layer.gradient_checkpointing for layer in layers):
        fallbacks.append(Fallback("model.recompute=full", _recompute))
    head = settings.loss.head
    # Finding the head runs a forward, which a process of a sharded model cannot do alone.
    is_open = head is None and loss == "auto" and settings.shards is None
    found = decoder_and_head(model) if is_open else head
    if isinstance(found, Head) and (
        head is None or settings.loss.chunk_tokens > SMALL_CHUNK_TOKENS
    ):
        smaller = replace(
            settings, loss=replace(settings.loss, head=found, chunk_tokens=SMALL_CHUNK_TOKENS)
        )
        fallbacks.append(
            Fallback(
                f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time",
                lambda work: replace(
                    micro_batch_work(work.model, work.optimizer, smaller, scaler=work.scaler),
                    clip=work.clip,
                ),
            )
        )
    if may_recompute and next(model.parameters()).device.type != "cpu" and settings.shards is None:
        fallbacks.append(Fallback("model.offload_activations=true", _offload))
    return fallbacks


def _recompute(work: Work[MicroBatch]) -> Work[MicroBatch]:
    set_recompute(work.model, "full")
    return work


def _offload(work: Work[MicroBatch]) -> Work[MicroBatch]:
    set_recompute(work.model, "full", offload=True)
    return work
