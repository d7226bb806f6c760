"""Allocates the state of bitsandbytes' 8-bit AdamW in a recording, without that library.

The sizes are those of bitsandbytes 0.50, optim/optimizer.py (Optimizer2State.init_state): two
states of one byte per element, two float32 for each 256 elements, and two code tables that all
parameters share. Parameters below 4,096 elements have two float32 states. A paged state of 100,000
elements or more is managed memory, outside of PyTorch's allocator (get_state_buffer).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_BLOCK = 256
_SMALLEST_IN_8_BIT = 4096
_SMALLEST_PAGED = 100_000
_NUM_CODES = 256


class StateOf8BitAdamW(torch.optim.Optimizer):
    """An optimizer whose steps allocate state but change no parameter.

    paged: large states are outside of PyTorch's allocator.
    """

    def __init__(self, groups: list[dict[str, object]], *, paged: bool = False) -> None:
        super().__init__(groups, {})
        self._paged = paged
        self._tables: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter].update(self._new_state(parameter))

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        size, device = parameter.numel(), parameter.device
        if size < _SMALLEST_IN_8_BIT:
            return {
                name: torch.zeros_like(parameter, dtype=torch.float32)
                for name in ("state1", "state2")
            }
        if not self._tables:
            self._tables = {
                name: torch.zeros(_NUM_CODES, device=device) for name in ("qmap1", "qmap2")
            }
        state = dict(self._tables)
        for name in ("state1", "state2") if not (self._paged and size >= _SMALLEST_PAGED) else ():
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        for name in ("absmax1", "absmax2"):
            state[name] = torch.zeros(-(-size // _BLOCK), device=device)
        return state
