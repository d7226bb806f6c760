"""Builds what the training step needs from a configuration: optimizer, settings, and layouts.

`assemble` takes a model that exists already, on a device or with fake tensors. So the step that is
recorded for a prediction is assembled by the same code as the step that trains.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel

from fitune.batch_size.scaling import (
    OptimSettings,
    configured_lr,
    scaling_note,
    settings_of,
    with_settings,
)
from fitune.config import BatchConfig, EvalConfig, ModelConfig, Recompute, RunConfig
from fitune.data.packing import group, lay_out, sort_by_length
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.distributed.sharding import ShardPeers, shard_model
from fitune.errors import ConfigError
from fitune.model.compile import compile_layers
from fitune.model.packed_attention import can_pack
from fitune.model.precision import Precision, device_precision, resolve_precision
from fitune.model.recompute import set_recompute
from fitune.objectives.choose import choose_objective
from fitune.step.optimizer import build_optimizer
from fitune.step.work import StepSettings

if TYPE_CHECKING:
    from peft import PeftModel  # half a second, needed for adapters only

#: On a CPU larger micro-batches are not faster and take more memory: 505 tokens/s at 512 tokens,
#: and 498 at 1,024 tokens with 200 MB more.
CPU_MICRO_TOKENS = 512
CUDA_MICRO_TOKENS = 8192
#: A commit buffer may take this fraction of the model's bytes. LoRA of rank 16 on SmolLM2-135M
#: trains 3.6 % of the parameters, which is 7 % of the bytes at half precision.
COMMIT_FRACTION = 0.1
#: whether samples are packed, and a note on it
Packing = tuple[bool, str | None]


@dataclass(frozen=True)
class Layout:
    """How an effective batch is split into micro-batches: by `micro_rows` or by `micro_tokens`."""

    packed: bool
    micro_rows: int | None
    micro_tokens: int | None

    def split(self, batch: Batch) -> list[MicroBatch]:
        return [lay_out(rows, packed=self.packed) for rows in self.group(batch)]

    def group(self, batch: Batch) -> list[list[Row]]:
        """Return the samples of each micro-batch.

        Samples that will be padded are sorted by length first if the configuration leaves the split
        open.
        """
        if not self.packed and self.micro_rows is None:
            batch = sort_by_length(batch)
        return group(
            batch, packed=self.packed, micro_rows=self.micro_rows, micro_tokens=self.micro_tokens
        )


@dataclass(frozen=True)
class Setup:
    """A model with all that its training steps need."""

    model: "PreTrainedModel | PeftModel"
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    settings: StepSettings
    layout: Layout
    eval_layout: Layout
    #: for the effective batch, at the peak rate
    optim: OptimSettings
    recompute: Recompute
    #: what was decided for the user, one message each
    notes: tuple[str, ...]

    @property
    def peak_lr(self) -> float:
        return self.optim.lr


def choose_precision(model: ModelConfig, device: torch.device) -> Precision:
    return resolve_precision(model, *device_precision(device))


def assemble(
    model: "PreTrainedModel | PeftModel",
    config: RunConfig,
    *,
    device: torch.device,
    precision: Precision,
    peers: ShardPeers | None = None,
    packing: Packing | None = None,
) -> Setup:
    """Build everything that a step needs around a loaded model.

    peers: the processes that the model is sharded over, if model.shard says so.
    packing: what `choose_packing` returned for this model, if it was called already.

    Raises ModelError or ConfigError if the model cannot do what is configured.
    """
    notes = [f"precision {precision.name}: {precision.reason}"]
    packed, note = packing or choose_packing(model, wanted=config.data.packing)
    recompute = _set_layers(model, config.model, device)
    objective, loss_note = choose_objective(model, config, device=device)
    notes += [line for line in (note, loss_note) if line]
    # Compiling and sharding follow the checks above, which run forwards: these would be compiled
    # too, and need the whole model in the host's memory. A recording needs the layers uncompiled.
    if config.model.compile and not is_fake(next(model.parameters())):
        compile_layers(model, device)
    shards = None
    if peers is not None:
        idle = objective.made_up_row(0, np.array([1, 2]), 0)
        shards = shard_model(model, peers, device=device, idle=lay_out([idle], packed=packed))
    lr = configured_lr(config.optim, config.model.method, config.objective)
    optim = settings_of(config.optim, lr=lr, rows=config.batch.rows_per_step)
    if config.optim.scaling != "none":
        notes.append(scaling_note(config.optim, optim, lr=lr, rows=config.batch.rows_per_step))
    layout, eval_layout = choose_layouts(config.batch, config.eval, device, packed=packed)
    # A failure in one process of a sharded model makes all of them begin the step again.
    commit = shards is None and _few_are_trained(model)
    return Setup(
        model=model,
        optimizer=build_optimizer(
            model, with_settings(config.optim, optim), lr=optim.lr, device=device
        ),
        scaler=torch.amp.GradScaler(device.type) if precision.needs_scaler else None,
        settings=StepSettings(
            objective, optim.clip, precision.autocast_dtype, commit=commit, shards=shards
        ),
        layout=layout,
        eval_layout=eval_layout,
        optim=optim,
        recompute=recompute,
        notes=tuple(notes),
    )


def _few_are_trained(model: nn.Module) -> bool:
    """Return whether float32 gradients and optimizer state are small compared with the model."""
    trained = sum(
        4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    return trained <= COMMIT_FRACTION * sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


def choose_layouts(
    batch: BatchConfig, evaluation: EvalConfig, device: torch.device, *, packed: bool
) -> tuple[Layout, Layout]:
    """Return the layouts of training and evaluation, for packed or padded samples."""
    layout = _choose_layout(batch, device, packed=packed)
    if evaluation.micro == "auto":
        return layout, layout
    return layout, Layout(packed, evaluation.micro, None)


def _set_layers(model: nn.Module, settings: ModelConfig, device: torch.device) -> Recompute:
    if settings.offload_activations and device.type == "cpu":
        raise ConfigError(
            [
                "model.offload_activations moves them to the host's memory, where they are on a CPU: drop it"
            ]
        )
    recompute: Recompute = "off" if settings.recompute == "auto" else settings.recompute
    set_recompute(model, recompute, offload=settings.offload_activations)
    return recompute


def choose_packing(model: nn.Module, *, wanted: bool) -> Packing:
    """Decide whether samples are packed, by a forward of the model if data.packing is set."""
    reason = can_pack(model) if wanted else None
    if reason is not None:
        return False, f"samples are padded, not packed: {reason}"
    return wanted, None


def _choose_layout(batch: BatchConfig, device: torch.device, *, packed: bool) -> Layout:
    if batch.micro_tokens != "auto":
        return Layout(packed, None, batch.micro_tokens)
    if batch.micro_rows is not None:
        return Layout(packed, batch.micro_rows, None)
    return Layout(packed, None, CPU_MICRO_TOKENS if device.type == "cpu" else CUDA_MICRO_TOKENS)
