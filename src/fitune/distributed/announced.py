"""Announce each FSDP collective to the other processes before it begins.

The classes take the place of FSDP2's own all-gather and reduce-scatter. `sharding.py` explains why
a process must not enter a collective before all processes have agreed to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

#: (kind, tensor, collective) -> the result of the collective, which runs once all processes agree
Announce = Callable[[str, Tensor, Callable[[], object]], object]


class AnnouncedGather(DefaultAllGather):
    """FSDP's all-gather, run by way of `announce`."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        gather = partial(super().__call__, output_tensor, input_tensor, group, async_op)
        return self._announce("gather", output_tensor, gather)


class AnnouncedReduction(DefaultReduceScatter):
    """FSDP's reduce-scatter, run by way of `announce`.

    read: called with this process's own flat gradient before it is summed with the others'.
    """

    def __init__(self, announce: Announce, read: Callable[[Tensor], None]) -> None:
        self._announce, self._read = announce, read

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._read(input_tensor)
        reduce = partial(super().__call__, output_tensor, input_tensor, group, op, async_op)
        return self._announce("reduce", input_tensor, reduce)
