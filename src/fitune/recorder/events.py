"""Describes what a training step allocates and frees, in order, as plain data.

Recorders write these events, and `fitune.allocator` reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

Category = Literal[
    "parameter", "gradient", "optimizer_state", "activation", "temporary", "input", "workspace"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
Phase = Literal["load", "forward", "backward", "optimizer"]

#: What `MemoryTrace.source` says by routing policy, where a mixture of experts was recorded.
ROUTED: Mapping[str, str] = {
    "balanced": "assumed: every expert gets as many tokens as any other (routing balanced)",
    "worst": "assumed: all tokens go to the same experts (routing worst)",
}
#: What `MemoryTrace.source` says if the worst routing is wanted, but there are no experts.
UNROUTED = (
    "routing worst changes nothing: where the tokens go has no part in the memory of this model"
)


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """A storage is allocated or freed, or the allocator's cache is emptied."""

    #: an id, used once
    storage: int
    #: the requested bytes of an allocation, minus these bytes for its free, 0 for the emptied cache
    num_bytes: int
    category: Category
    phase: Phase
    #: the optimizer step, counted from 1; 0 for what happens before the first one
    step: int = 0
    #: its index in the step
    micro_batch: int = 0
    #: the dotted path of the innermost module that runs
    module: str = ""
    #: the operator that allocated the storage
    op: str = ""
    #: the stream on which the storage is allocated
    stream: int = 0


@dataclass(frozen=True)
class EventColumns:
    """The numbers of all events, with a column for each field that an allocator needs."""

    storage: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    stream: npt.NDArray[np.int64]
    #: index into CATEGORIES
    category: npt.NDArray[np.int64]


@runtime_checkable
class Columnar(Protocol):
    """Events that are stored as columns, and made into objects when somebody looks at one."""

    def columns(self) -> EventColumns: ...

    def modules(self, indices: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return the modules of these events; see `MemoryTrace.modules`."""
        ...


COMPILED = (
    "torch.compile is not predicted: the bytes are those without it, an upper bound (published "
    "measurements lie 7 to 15 % lower, those of one script by half)"
)
#: The beginning of the line of `MemoryTrace.source` with a script's own PYTORCH_ALLOC_CONF.
ALLOCATOR = "allocator settings: "
#: The beginning of the line of `MemoryTrace.source` on the versions that were recorded.
VERSIONS = "predicted for torch "


@dataclass(frozen=True)
class MemoryTrace:
    """Memory events in order, and what is known about them."""

    events: Sequence[MemoryEvent]
    #: what was recorded and under which assumptions, one line each
    source: tuple[str, ...] = ()

    def columns(self) -> EventColumns:
        if isinstance(self.events, Columnar):
            return self.events.columns()
        numbers = [
            (each.storage, each.num_bytes, each.step, each.stream, CATEGORIES.index(each.category))
            for each in self.events
        ]
        return EventColumns(*np.array(numbers, dtype=np.int64).reshape(-1, 5).T)

    def modules(self, indices: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return the modules' names, and for each of these allocations the index of its name."""
        if isinstance(self.events, Columnar):
            return self.events.modules(indices)
        return [self.events[i].module for i in indices.tolist()], np.arange(len(indices))


#: Names of work in `OperatorWork.op`, see there.
TRANSFER, ON_HOST = "transfer", "host."


@dataclass(frozen=True, slots=True)
class OperatorWork:
    """The work of all calls of one operator in a phase of a micro-batch.

    Views, which launch no kernel, are not counted.
    """

    step: int
    micro_batch: int
    phase: Phase
    #: PyTorch's name, such as aten.mm; TRANSFER for copies between the card and the host; with the
    #: prefix ON_HOST, what an optimizer does with tensors in host memory
    op: str
    #: of the first output, in PyTorch's words, such as bfloat16
    dtype: str
    num_calls: int
    #: the tensors that are read and written, each once a call; for a transfer, what is written
    num_bytes: int
    #: 0 for all but matrix products and attention
    flops: int
