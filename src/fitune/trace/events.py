"""What a training step allocates and frees, in order: pure data, written by the recorders and read by `memory/`."""

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

ROUTED: Mapping[str, str] = {
    "balanced": "assumed: every expert gets as many tokens as any other (routing balanced)",
    "worst": "assumed: all tokens go to the same experts (routing worst)",
}
"""What `MemoryTrace.source` says by routing policy where it was asked for."""
UNROUTED = (
    "routing worst changes nothing: where the tokens go has no part in the memory of this model"
)
"""What it says where it was not, though the worst was wanted."""


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """A storage is born (`num_bytes` > 0 requested bytes), dies (minus what its birth requested), or the allocator's
    cache is emptied (0).

    storage: an id, used once. step: the optimizer step it happens in, 0 for what comes before the first one, which is
    step 1. micro_batch: its index in the step. module: the dotted path of the innermost module that runs. op: the
    operator that asked for it. stream: the stream that it is allocated on.
    """

    storage: int
    num_bytes: int
    category: Category
    phase: Phase
    step: int = 0
    micro_batch: int = 0
    module: str = ""
    op: str = ""
    stream: int = 0


@dataclass(frozen=True)
class EventColumns:
    """The numbers of all events, a column for each field that an allocator needs. category: index into CATEGORIES."""

    storage: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    stream: npt.NDArray[np.int64]
    category: npt.NDArray[np.int64]


@runtime_checkable
class Columnar(Protocol):
    """Events that are columns already and made into objects one by one, where somebody looks at one."""

    def columns(self) -> EventColumns: ...

    def modules(self, indices: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """As `MemoryTrace.modules`."""
        ...


COMPILED = (
    "torch.compile is not predicted: the bytes are those without it, an upper bound (published measurements lie 7 to "
    "15 % lower, those of one script by half)"
)
VERSIONS = "predicted for torch "
"""Begins the sentence on the versions that were recorded with."""


@dataclass(frozen=True)
class MemoryTrace:
    """Events in order. `source` says what was recorded and under which assumptions, one sentence each."""

    events: Sequence[MemoryEvent]
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
        """Modules of these births: names, and for each birth the index of its own."""
        if isinstance(self.events, Columnar):
            return self.events.modules(indices)
        return [self.events[i].module for i in indices.tolist()], np.arange(len(indices))


TRANSFER, ON_HOST = "transfer", "host."
"""See OperatorWork."""


@dataclass(frozen=True, slots=True)
class OperatorWork:
    """What all calls of one operator in a phase of a micro-batch do; views, which launch nothing, are left out.

    op: as PyTorch names it, aten.mm; TRANSFER for copies between the card and the host, and behind ON_HOST what an
    optimizer does with tensors of the host. dtype: of its first output, as PyTorch names it, bfloat16. num_bytes:
    tensors that it reads and writes, each once a call; of a transfer what arrives. flops: 0 for what is no matrix
    product and no attention.
    """

    step: int
    micro_batch: int
    phase: Phase
    op: str
    dtype: str
    num_calls: int
    num_bytes: int
    flops: int
