"""FSDP's collectives, each announced before it begins (see distributed/sharding.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

Announce = Callable[[str, Tensor, Callable[[], object]], Any]
"""(kind, tensor, the collective itself) -> what that gives."""


class AnnouncedGather(DefaultAllGather):
    def __init__(self, announce: Announce) -> None:
        self._announce = announce

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        gather = partial(super().__call__, output_tensor, input_tensor, group, async_op)
        return self._announce("gather", output_tensor, gather)


class AnnouncedReduction(DefaultReduceScatter):
    """read: given what this process brings to each sum."""

    def __init__(self, announce: Announce, read: Callable[[Tensor], None]) -> None:
        self._announce, self._read = announce, read

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._read(input_tensor)
        reduce = partial(super().__call__, output_tensor, input_tensor, group, op, async_op)
        return self._announce("reduce", input_tensor, reduce)
