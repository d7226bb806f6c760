"""What a `Recorder` holds of each storage, and the state that it can return to."""

import weakref
from dataclasses import dataclass

import torch

from fitune.recorder.events import Category, Phase
from fitune.recorder.kernels import Kernels
from fitune.recorder.recording import NEVER, Rule, Where

#: Phase, step, micro-batch, loop, iteration, operator and dtype: the key of a sum of operator
#: calls.
WorkPlace = tuple[Phase, int, int, str, int, str, str]


@dataclass(slots=True, eq=False)
class RecordedStorage:
    """A storage that was allocated, and how it was freed."""

    num_bytes: int
    #: None until it is known
    category: Category | None
    #: the place in the step where the storage was allocated
    where: Where
    #: the operator that allocated it
    op: str
    #: tells whether the storage still exists; None where no tensor of this process stands for it
    reference: weakref.ref[torch.UntypedStorage] | None = None
    #: the number of the last allocation before the storage was freed, or NEVER
    freed_after: int = NEVER
    #: the place in the step where the storage was freed, None while it is live
    freed_at: Where | None = None
    #: the rule that gives the size of a kernel's temporary
    rule: Rule | None = None


@dataclass(frozen=True)
class Savepoint:
    """The state of a recording between two loops, which further loops start from."""

    num_allocations: int
    num_empty_rules: int
    work: dict[WorkPlace, tuple[int, ...]]
    #: the live storages and the category that each has had, by their address in PyTorch
    live: dict[int, tuple[RecordedStorage, Category | None]]
    #: addresses of the live storages in host memory
    host: frozenset[int]
    #: the kernels' workspaces that were not freed
    workspaces: list[RecordedStorage]
    #: a copy of the recorder's kernels, with their own state
    kernels: Kernels
