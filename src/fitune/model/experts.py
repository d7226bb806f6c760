"""Fused experts under autocast and without data, where transformers' grouped matrix product falls short.

torch's grouped product knows nothing of autocast, so experts held in float32 would multiply in float32 however the run
is configured; and its shape rule refuses all but bfloat16, so a float32 model could not be recorded on fake tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers.integrations import moe

EXPERTS = "fitune_experts"  # the name in transformers' registry of experts implementations


class _Autocast:
    """An experts module whose parameters read as the autocast format."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def grouped_experts(
    module: nn.Module, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: each token's K experts, weighted and summed, [T, D]."""
    device = hidden_TD.device.type
    cast_to = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    experts = module if cast_to is None else _Autocast(module, cast_to)
    with _shapes_of_any_format() if hidden_TD.is_meta or is_fake(hidden_TD) else nullcontext():
        return cast(torch.Tensor, moe.grouped_mm_experts_forward(experts, hidden_TD, expert_TK, weight_TK))


@contextmanager
def _shapes_of_any_format() -> Iterator[None]:
    """Without data transformers' own operator stands in for torch's: it makes the same tensors and has a shape rule for
    every format."""
    original = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


moe.ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_experts)
