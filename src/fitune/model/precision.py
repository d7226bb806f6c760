"""Decide the dtype of parameters, matrix products and gradients, and give the reason."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from fitune.config import ModelConfig
from fitune.config import Precision as PrecisionName


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a run."""

    name: PrecisionName
    #: that of the model's own weights. Adapters are always float32, so that small updates are
    #: not rounded away.
    parameter_dtype: torch.dtype
    #: that of the matrix products if it differs, else None
    autocast_dtype: torch.dtype | None
    #: whether the small range of float16 needs a GradScaler
    needs_scaler: bool
    #: one clause that says who or what decided
    reason: str

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Return the dtype of matrix products, and so of activations between layers."""
        return self.autocast_dtype or self.parameter_dtype

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Return the context of the forward pass; it does nothing without an autocast dtype."""
        enabled = self.autocast_dtype is not None
        return cast(
            AbstractContextManager[Any],
            torch.autocast(
                device_type, dtype=self.autocast_dtype or torch.float32, enabled=enabled
            ),
        )


def resolve_precision(model: ModelConfig, device_type: str, bfloat16: bool) -> Precision:
    """Return the precision for `model.precision`; for `auto` the training device decides.

    device_type: 'cuda' or 'cpu'.
    bfloat16: whether that device computes in bfloat16 at full speed.

    Full fine-tuning on a GPU keeps float32 parameters under autocast, because an AdamW update is
    often smaller than the spacing of bfloat16 (2**-8 of the value) and would be lost. With adapters
    the frozen weights are never updated, so they are stored in 16 bits for half the memory, and
    only the adapters are float32.
    """
    if model.precision != "auto":
        return _precision(model.precision, model.method, reason="as configured")
    if device_type == "cpu":
        reason = (
            "a CPU without bfloat16 instructions runs bfloat16 about 20 times slower"
            if not bfloat16
            else "a CPU"
        )
        return _precision("float32", model.method, reason=reason)
    if not bfloat16:
        return _precision(
            "autocast_float16",
            model.method,
            reason="this GPU has no bfloat16; gradients are scaled",
        )
    if model.method != "full":
        return _precision(
            "bfloat16", model.method, reason="frozen weights lose nothing by half the memory"
        )
    return _precision(
        "autocast_bfloat16", model.method, reason="small updates need float32 parameters"
    )


def device_precision(device: torch.device) -> tuple[str, bool]:
    """Return (device type, whether it computes in bfloat16 at full speed) for a local device.

    These are the arguments of `resolve_precision`.
    """
    if device.type == "cuda":
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return "cpu", bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _precision(name: PrecisionName, method: str, *, reason: str) -> Precision:
    dtypes: dict[PrecisionName, tuple[torch.dtype, torch.dtype | None]] = {
        "float32": (torch.float32, None),
        # A bfloat16 model has float32 adapters; autocast computes their products in bfloat16.
        "bfloat16": (torch.bfloat16, torch.bfloat16 if method != "full" else None),
        "autocast_bfloat16": (torch.float32, torch.bfloat16),
        # Trained weights are float32, since a GradScaler cannot unscale float16 gradients.
        "autocast_float16": (torch.float16 if method != "full" else torch.float32, torch.float16),
    }
    parameter_dtype, autocast_dtype = dtypes[name]
    return Precision(name, parameter_dtype, autocast_dtype, name == "autocast_float16", reason)
