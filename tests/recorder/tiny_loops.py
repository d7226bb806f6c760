"""One-layer models and loops around one operator, so that a test sees what that operator allocates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryEvent
from fitune.recorder.record import Loop, RecordSettings, record_loop

AMPERE = CudaTarget((8, 0), torch_version=(2, 14))
HOPPER = CudaTarget((9, 0), torch_version=(2, 14))


class Scale(nn.Module):
    """x * weight, then the function under test."""

    def __init__(
        self, width: int, function: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


def training(shape: tuple[int, ...], dtype: torch.dtype, autocast: torch.dtype | None) -> Loop:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        x = torch.ones(shape, dtype=dtype, device=device)

        def step() -> None:
            with torch.autocast(
                device.type, autocast or torch.bfloat16, enabled=autocast is not None
            ):
                out = model(x)
            out.float().sum().backward()

        return step

    return loop


def record_function(
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    target: CudaTarget | None = AMPERE,
) -> tuple[MemoryEvent, ...]:
    """Births and deaths of one step of `function(x * weight)`, x of this shape."""
    return record_loop(
        lambda: Scale(shape[-1], function, dtype),
        training(shape, dtype, autocast),
        RecordSettings(target=target, num_steps=1),
    ).events


def births(events: tuple[MemoryEvent, ...], op: str) -> list[int]:
    """Bytes of what operators with `op` in their name allocated, in order."""
    return [event.num_bytes for event in events if event.num_bytes > 0 and op in event.op]
