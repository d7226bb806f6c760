"""From a configuration to everything a run needs in memory: device, model, tokenizer, data, optimizer, step settings."""

from dataclasses import dataclass

import torch
from torch import nn

from fitune.config import RunConfig
from fitune.data.examples import Examples, load_examples
from fitune.model.device import choose_device
from fitune.model.head import head_reason
from fitune.model.load import load_model, load_tokenizer
from fitune.model.precision import Precision, choose_precision
from fitune.step.loss import LossSettings
from fitune.step.optimizer import build_optimizer
from fitune.step.train_step import StepSettings

DEFAULT_LR = {"full": 2e-5, "lora": 2e-4}
"""LoRA trains a small new part from zero, full fine-tuning moves what is already good: ten times apart is the usual
distance (Schulman et al. 2025, "LoRA Without Regret")."""

CPU_MICRO_TOKENS = 1024
CUDA_MICRO_TOKENS = 8192


@dataclass(frozen=True)
class Layout:
    """How the rows of an effective batch are laid out in micro-batches: by rows or by tokens, packed or padded."""

    packed: bool
    micro_rows: int | None
    micro_tokens: int | None


@dataclass(frozen=True)
class Setup:
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    settings: StepSettings
    layout: Layout
    eval_layout: Layout
    peak_lr: float
    notes: tuple[str, ...]
