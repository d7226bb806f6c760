"""Lists the ways to save memory if a single sample does not fit. None of them changes the gradient."""

from dataclasses import replace

from torch import nn

from fitune.config import Auto, Loss, Recompute
from fitune.data.rows import MicroBatch
from fitune.model.recompute import recomputable_layers, set_recompute
from fitune.recovery.protection import Fallback
from fitune.step.progress import Work
from fitune.step.work import StepSettings, micro_batch_work


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
    # A search in the model runs a forward, which a process of a sharded model cannot do alone.
    may_search = loss == "auto" and settings.shards is None
    smaller = settings.objective.smaller(model if may_search else None)
    if smaller is not None:
        objective, name = smaller
        changed = replace(settings, objective=objective)
        fallbacks.append(
            Fallback(
                name,
                lambda work: replace(
                    micro_batch_work(work.model, work.optimizer, changed, scaler=work.scaler),
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
