"""From a configuration to what the training step needs: model, optimizer, settings, and how rows become micro-batches.

`assemble` takes a model that exists already, real or fake, so that the step that is recorded for a prediction is put
together by the same code as the step that trains.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from fitune.config import Recompute, RunConfig
from fitune.data.packing import group, lay_out, sort_by_length
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.distributed.sharding import ShardPeers, shard_model
from fitune.errors import ConfigError, ModelError
from fitune.model.compile import compile_layers
from fitune.model.head import Head, decoder_and_head
from fitune.model.packed_attention import can_pack
from fitune.model.precision import Precision, device_precision, resolve_precision
from fitune.model.recompute import set_recompute
from fitune.objectives.supervised import LossSettings, choose_chunk_tokens
from fitune.step.optimizer import build_optimizer
from fitune.step.work import StepSettings

if TYPE_CHECKING:
    from peft import PeftModel  # half a second, needed for adapters only

CPU_MICRO_TOKENS = 512
"""On a CPU larger micro-batches are no faster, only larger: 505 tokens/s at 512 and 498 at 1,024, with 200 MB more."""
CUDA_MICRO_TOKENS = 8192
COMMIT_FRACTION = 0.1
"""Of the model's bytes: LoRA of rank 16 on SmolLM2-135M trains 3.6 % of the parameters, at half precision 7 %."""
Packing = tuple[bool, str | None]
"""Whether rows are packed, and what there is to say of it."""


@dataclass(frozen=True)
class Layout:
    """How the rows of an effective batch become micro-batches. One of micro_rows and micro_tokens is None."""

    packed: bool
    micro_rows: int | None
    micro_tokens: int | None

    def split(self, batch: Batch) -> list[MicroBatch]:
        return [lay_out(rows, packed=self.packed) for rows in self.group(batch)]

    def group(self, batch: Batch) -> list[list[Row]]:
        """The rows of each micro-batch. Padded rows are sorted by length first, within the batch, where the
        configuration leaves the split open."""
        if not self.packed and self.micro_rows is None:
            batch = sort_by_length(batch)
        return group(
            batch, packed=self.packed, micro_rows=self.micro_rows, micro_tokens=self.micro_tokens
        )


@dataclass(frozen=True)
class Setup:
    """optim: of the effective batch, at the peak rate. notes: what was decided for the user, one sentence each."""

    model: "PreTrainedModel | PeftModel"
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    settings: StepSettings
    layout: Layout
    eval_layout: Layout
    optim: OptimSettings
    recompute: Recompute
    notes: tuple[str, ...]

    @property
    def peak_lr(self) -> float:
        return self.optim.lr


def choose_precision(config: RunConfig, device: torch.device) -> Precision:
    return resolve_precision(config.model, *device_precision(device))


def assemble(
    model: "PreTrainedModel | PeftModel",
    config: RunConfig,
    *,
    device: torch.device,
    precision: Precision,
    peers: ShardPeers | None = None,
    packing: Packing | None = None,
) -> Setup:
    """Everything around a loaded model. peers: the processes that it is dealt over, as model.shard asks for. packing:
    what `choose_packing` has said of the model, where it was asked. Raises ModelError or ConfigError for what this
    model cannot do."""
    notes = [f"precision {precision.name}: {precision.reason}"]
    packed, note = packing or choose_packing(model, config)
    recompute = _set_layers(model, config, device)
    head, head_note = _choose_head(model, config)
    notes += [line for line in (note, head_note) if line]
    if config.model.compile and not is_fake(
        next(model.parameters())
    ):  # a recording sees the layers as they are
        compile_layers(
            model, device
        )  # after the model was asked what it can do, which would compile it for that alone
    shards = None
    if (
        peers is not None
    ):  # after the model was asked what it can do, which needs all of it, in the host's memory
        shards = shard_model(model, peers, device=device, packed=packed)
    lr = configured_lr(config)
    optim = settings_of(config.optim, lr=lr, rows=config.batch.rows_per_step)
    if config.optim.scaling != "none":
        notes.append(scaling_note(config.optim, optim, lr=lr, rows=config.batch.rows_per_step))
    layout, eval_layout = choose_layouts(config, device, packed=packed)
    return Setup(
        model=model,
        optimizer=build_optimizer(
            model, with_settings(config.optim, optim), lr=optim.lr, device=device
        ),
        scaler=torch.amp.GradScaler(device.type) if precision.needs_scaler else None,
        settings=StepSettings(
            LossSettings()
            if head is None
            else LossSettings(head, choose_chunk_tokens(head, device)),
            optim.clip,
            precision.autocast_dtype,
            commit=shards is None
            and _few_are_trained(model),  # what fails in one process is begun again in all
            shards=shards,
        ),
        layout=layout,
        eval_layout=eval_layout,
        optim=optim,
        recompute=recompute,
        notes=tuple(notes),
    )


def _few_are_trained(model: nn.Module) -> bool:
    """Whether a second copy of the gradient, in float32, and of the optimizer's state is little beside the model."""
    trained = sum(
        4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    return trained <= COMMIT_FRACTION * sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


def choose_layouts(
    config: RunConfig, device: torch.device, *, packed: bool
) -> tuple[Layout, Layout]:
    """(of training, of evaluation), for a model whose rows are packed or not."""
    layout = _choose_layout(config, device, packed=packed)
    return layout, layout if config.eval.micro == "auto" else Layout(
        packed, config.eval.micro, None
    )


def _set_layers(model: nn.Module, config: RunConfig, device: torch.device) -> Recompute:
    if config.model.offload_activations and device.type == "cpu":
        raise ConfigError(
            [
                "model.offload_activations moves them to the host's memory, where they are on a CPU: drop it"
            ]
        )
    recompute: Recompute = "off" if config.model.recompute == "auto" else config.model.recompute
    set_recompute(model, recompute, offload=config.model.offload_activations)
    return recompute


def choose_packing(model: nn.Module, config: RunConfig) -> Packing:
    """Asks the model itself, in a forward."""
    reason = can_pack(model) if config.data.packing else None
    if reason is not None:
        return False, f"samples are padded, not packed: {reason}"
    return config.data.packing, None


def _choose_head(model: nn.Module, config: RunConfig) -> tuple[Head | None, str | None]:
    if config.loss == "full":
        return None, None
    head = decoder_and_head(model)
    if isinstance(head, Head):
        return head, None
    if config.loss == "chunked":
        raise ModelError(f"loss=chunked does not fit this model: {head}; use loss=full")
    return None, f"full logits: {head}"


def _choose_layout(config: RunConfig, device: torch.device, *, packed: bool) -> Layout:
    if config.batch.micro_tokens != "auto":
        return Layout(packed, None, config.batch.micro_tokens)
    if config.batch.micro_rows is not None:
        return Layout(packed, config.batch.micro_rows, None)
    return Layout(packed, None, CPU_MICRO_TOKENS if device.type == "cpu" else CUDA_MICRO_TOKENS)
