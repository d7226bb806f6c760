"""Compute fused experts where transformers' grouped matrix product is not enough.

These cases are autocast, 4-bit weights, and tensors without data. torch's grouped product ignores
autocast, so experts stored in float32 would be multiplied in float32 however the run is configured.
Its shape rule accepts only bfloat16, so a float32 model could not be recorded on fake tensors.
4-bit weights are unpacked for a product and then freed, in the forward and again in the backward,
like those of linear layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers.integrations import moe

#: the name in transformers' registry of experts implementations
EXPERTS = "fitune_experts"
#: the weights of all experts of a layer, as the registry's implementations read them
STACKED = ("gate_up_proj", "up_proj", "down_proj")


class _Autocast:
    """An experts module whose parameters appear in the autocast dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> object:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def grouped_experts(
    module: nn.Module, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of each token's K experts, [T, D]: transformers' interface."""
    device = hidden_TD.device.type
    cast_to = (
        torch.get_autocast_dtype(device)
        if device != "meta" and torch.is_autocast_enabled(device)
        else None
    )
    experts = module if cast_to is None else _Autocast(module, cast_to)
    if any(name in module._modules for name in STACKED):
        dtype = cast_to or hidden_TD.dtype
        with patch.object(moe, "_grouped_mm", _packed_product):
            return cast(
                torch.Tensor,
                moe.grouped_mm_experts_forward(
                    _Packed(experts, module, dtype), hidden_TD, expert_TK, weight_TK
                ),
            )
    with _shapes_of_any_format() if hidden_TD.is_meta or is_fake(hidden_TD) else nullcontext():
        return cast(
            torch.Tensor, moe.grouped_mm_experts_forward(experts, hidden_TD, expert_TK, weight_TK)
        )


class _Packed:
    """An experts module whose packed weights appear as `_PackedWeight`."""

    def __init__(self, experts: object, module: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._packed, self._dtype = experts, module._modules, dtype

    def __getattr__(self, name: str) -> object:
        packed = self._packed.get(name) if name in STACKED else None
        return (
            getattr(self._experts, name) if packed is None else _PackedWeight(packed, self._dtype)
        )


@dataclass(frozen=True)
class _PackedWeight:
    """Supports what transformers' `_grouped_linear` does with a weight: transpose and multiply."""

    packed: Any
    dtype: torch.dtype
    is_transposed: bool = False

    def transpose(self, *_: int) -> "_PackedWeight":
        return replace(self, is_transposed=not self.is_transposed)

    def unpacked(self) -> torch.Tensor:
        whole = cast(torch.Tensor, self.packed.unpacked(self.dtype))
        return whole.transpose(-2, -1) if self.is_transposed else whole


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: _PackedWeight, offs: torch.Tensor
    ) -> torch.Tensor:
        ctx.weight, ctx.offs = weight, offs
        return _product(input, weight.unpacked(), offs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _product(grad, ctx.weight.unpacked().transpose(-2, -1), ctx.offs), None, None


def _product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    with _shapes_of_any_format() if input.is_meta or is_fake(input) else nullcontext():
        return cast(torch.Tensor, _grouped_mm(input, weight, offs=offs))


def _packed_product(input: torch.Tensor, weight: Any, offs: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, _PackedWeight):
        return _product(input, weight, offs)
    args = input.to(weight.dtype), weight, offs
    return cast(torch.Tensor, _PackedProduct.apply(*args))  # type: ignore[no-untyped-call]


@contextmanager
def _shapes_of_any_format() -> Iterator[None]:
    """Replace torch's operator by transformers' own for tensors without data.

    It allocates the same tensors and has a shape rule for every dtype.
    """
    original = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


_grouped_mm = moe._grouped_mm
moe.ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_experts)
