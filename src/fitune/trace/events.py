"""What a training step allocates and frees, in order: pure data, written by the recorders and read by `memory/`."""

from dataclasses import dataclass
from typing import Literal

Category = Literal["parameter", "gradient", "optimizer_state", "activation", "temporary", "input", "workspace"]
Phase = Literal["load", "forward", "backward", "optimizer"]


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
class MemoryTrace:
    """Events in order. `source` says what was recorded and under which assumptions, one sentence each."""

    events: tuple[MemoryEvent, ...]
    source: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OperatorWork:
    """What all calls of one operator in a phase of a micro-batch do; views, which launch nothing, are left out.

    op: as PyTorch names it, aten.mm. dtype: of its first output, as PyTorch names it, bfloat16. num_bytes: tensors that
    it reads and writes, each once a call. flops: 0 for what is no matrix product and no attention.
    """

    step: int
    micro_batch: int
    phase: Phase
    op: str
    dtype: str
    num_calls: int
    num_bytes: int
    flops: int
