"""Holds a recorded training loop as columns: one row for each allocation, in order.

Each row also says when the allocation is freed. In this form, a recording can be made longer
without recording again (`repeat_layers`, `interpolate`). `to_trace` turns it into the events that
it stands for.

Most of a step is a loop over the model's layers, or over the chunks of a loss. The dotted path of a
module says to which iteration of the loop it belongs: model.layers.2.mlp belongs to iteration 2 of
the loop model.layers.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from operator import eq
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from fitune.recorder.events import (
    CATEGORIES,
    VERSIONS,
    Category,
    EventColumns,
    MemoryEvent,
    MemoryTrace,
    OperatorWork,
    Phase,
)

Integers = npt.NDArray[np.int64]
#: In place of an allocation's number: the storage is never freed.
NEVER = -1
#: The fields of a `Recording` that have one number for each allocation.
COLUMNS = (
    "num_bytes",
    "label",
    "loop",
    "iteration",
    "freed_after",
    "free_loop",
    "free_iteration",
    "rule",
)
#: The first number in the dotted path of a module.
_ITERATION = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class Where(NamedTuple):
    """A place in a training step; `module` is as in `MemoryEvent`."""

    phase: Phase
    step: int
    micro_batch: int
    module: str


class Rule(NamedTuple):
    """Gives the size of a kernel's temporary by the shapes of an operator's arguments."""

    op: str
    #: tensors are written as (shape, dtype)
    arguments: tuple[object, ...]
    #: which one it is of the temporaries that the rule gives
    position: int
    #: the number of temporaries that the rule gives
    total: int


class RecordedAllocation(NamedTuple):
    """An allocation of a recorded loop."""

    num_bytes: int
    category: Category
    where: Where
    op: str
    #: the number of the last allocation before the free, or NEVER
    freed_after: int
    #: the place in the step where it is freed, None if it never is
    freed_at: Where | None
    rule: Rule | None = None


class TraceWork(NamedTuple):
    """The work of all calls of an operator in one place of a step."""

    phase: Phase
    step: int
    micro_batch: int
    loop: str
    iteration: int
    op: str
    dtype: str
    #: this field and the two below are sums over these calls
    num_calls: int
    num_bytes: int
    flops: int

    @property
    def place(self) -> tuple[Any, ...]:
        return self[:-3]

    @property
    def sums(self) -> tuple[int, int, int]:
        return self[-3:]


class Label(NamedTuple):
    """What allocations of the same place have in common; {} stands for a module's iteration."""

    category: Category
    #: the place of the allocation
    where: Where
    op: str
    #: the place of the free
    freed_at: Where | None


@dataclass(frozen=True)
class Recording:
    """A recorded loop in columns of one length, with one row for each allocation."""

    labels: tuple[Label, ...]
    loops: tuple[str, ...]
    rules: tuple[Rule, ...]
    #: 0 where the allocator's cache is emptied
    num_bytes: Integers
    #: index into `labels`
    label: Integers
    #: index into `loops` of the loop that the module belongs to, -1 outside of loops
    loop: Integers
    #: the iteration of that loop, -1 outside of loops
    iteration: Integers
    #: as in `RecordedAllocation`
    freed_after: Integers
    #: loop and iteration of the module that runs when the storage is freed
    free_loop: Integers
    free_iteration: Integers
    #: index into `rules`, or -1
    rule: Integers
    #: (step, rule) of operators whose rules gave no temporaries
    empty_rules: tuple[tuple[int, Rule], ...]
    work: tuple[TraceWork, ...]
    #: as in `MemoryTrace`
    source: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.num_bytes)


def split_iteration(module: str) -> tuple[str, int, str]:
    """Split a module's path into the path with {} for its iteration, the iteration and the loop.

    The first number in the path is the iteration. It is -1, and the loop "", outside of loops.
    """
    found = _ITERATION.search(module)
    if found is None:
        return module, -1, ""
    start, end = found.span(1)
    return f"{module[:start]}{{}}{module[end:]}", int(found[1]), module[: max(start - 1, 0)] or "."


def make_recording(
    allocations: Iterable[RecordedAllocation],
    work: Iterable[TraceWork],
    *,
    empty_rules: Iterable[tuple[int, Rule]] = (),
    source: Sequence[str] = (),
) -> Recording:
    """Arrange allocations as columns."""
    labels: dict[Label, int] = {}
    loops: dict[str, int] = {"": -1}
    rules: dict[Rule, int] = {}
    table: list[tuple[int, ...]] = []
    known: dict[str, tuple[str, int, int]] = {}

    def place(module: str) -> tuple[str, int, int]:
        if module not in known:
            template, iteration, loop = split_iteration(module)
            known[module] = template, iteration, loops.setdefault(loop, len(loops) - 1)
        return known[module]

    for allocation in allocations:
        module, iteration, loop = place(allocation.where.module)
        freed_at, free_iteration, free_loop = allocation.freed_at, -1, -1
        if freed_at is not None:
            free_module, free_iteration, free_loop = place(freed_at.module)
            freed_at = freed_at._replace(module=free_module)
        label = Label(
            allocation.category, allocation.where._replace(module=module), allocation.op, freed_at
        )
        rule = -1 if allocation.rule is None else rules.setdefault(allocation.rule, len(rules))
        at_allocation = allocation.num_bytes, labels.setdefault(label, len(labels)), loop, iteration
        at_free = allocation.freed_after, free_loop, free_iteration, rule
        table.append((*at_allocation, *at_free))
    columns = np.array(table, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    return Recording(
        labels=tuple(labels),
        loops=tuple(loops)[1:],
        rules=tuple(rules),
        **dict(zip(COLUMNS, columns, strict=True)),
        empty_rules=tuple(dict.fromkeys(empty_rules)),
        work=tuple(work),
        source=tuple(source),
    )


def to_trace(recording: Recording) -> MemoryTrace:
    """Return the events that the recording stands for."""
    return MemoryTrace(RecordedEvents(recording), (*recording.source, versions()))


@cache
def versions() -> str:
    """Return the line of `MemoryTrace.source` that names the versions of the recorded packages.

    The memory of a step depends on their code, which differs between versions.
    """
    found = {}
    for package in ("torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    rest = [f"{package} {number}" for package, number in found.items() if package != "torch"]
    return f"{VERSIONS}{', '.join([found.get('torch', 'n/a'), *rest])}: others differ by 1 to 2 %"


class RecordedEvents(Sequence[MemoryEvent]):
    """The events of a recording, made into objects when they are looked at.

    Frees between the same two allocations are in the order of their allocations, which makes no
    difference to an allocator.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        allocations = np.arange(len(recording))
        freed = np.flatnonzero(recording.freed_after != NEVER)
        # allocation n is sorted at 2n, and the frees after it at 2n + 1
        at = np.concatenate([2 * allocations, 2 * recording.freed_after[freed] + 1])
        order = np.argsort(at, kind="stable")
        self._allocation = np.concatenate([allocations, freed])[order]
        self._is_free = (np.arange(len(at)) >= len(allocations))[order]
        allocates = recording.num_bytes > 0
        self._storage = np.cumsum(allocates) * allocates

    def columns(self) -> EventColumns:
        return self._columns

    @cached_property
    def _columns(self) -> EventColumns:
        recording, allocation = self._recording, self._allocation
        label = recording.label[allocation]
        steps = np.array(
            [(each.where.step, (each.freed_at or each.where).step) for each in recording.labels],
            dtype=np.int64,
        )
        categories = np.array(
            [CATEGORIES.index(each.category) for each in recording.labels], dtype=np.int64
        )
        return EventColumns(
            storage=self._storage[allocation],
            num_bytes=np.where(self._is_free, -1, 1) * recording.num_bytes[allocation],
            step=steps.reshape(-1, 2)[label, self._is_free.astype(np.int64)],
            stream=np.zeros(len(allocation), dtype=np.int64),
            category=categories[label],
        )

    def modules(self, indices: Integers) -> tuple[list[str], Integers]:
        """Return the modules of these allocations, as `MemoryTrace.modules` does."""
        recording, allocation = self._recording, self._allocation[indices]
        num_iterations = int(recording.iteration.max(initial=0)) + 2
        places, which = np.unique(
            recording.label[allocation] * num_iterations + recording.iteration[allocation] + 1,
            return_inverse=True,
        )
        modules = [each.where.module for each in recording.labels]
        labels_and_iterations = (divmod(place, num_iterations) for place in places.tolist())
        names = [
            _module_of_iteration(modules[label], iteration - 1)
            for label, iteration in labels_and_iterations
        ]
        return names, which

    def __len__(self) -> int:
        return len(self._allocation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    @overload
    def __getitem__(self, index: int) -> MemoryEvent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[MemoryEvent, ...]: ...
    def __getitem__(self, index: int | slice) -> MemoryEvent | tuple[MemoryEvent, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        recording, allocation = self._recording, int(self._allocation[index])
        category, where, op, freed_at = recording.labels[recording.label[allocation]]
        num_bytes, iteration = int(recording.num_bytes[allocation]), recording.iteration[allocation]
        if self._is_free[index]:
            assert freed_at is not None
            where, num_bytes, iteration = freed_at, -num_bytes, recording.free_iteration[allocation]
        phase, step, micro_batch, module = where
        module = _module_of_iteration(module, int(iteration))
        storage = int(self._storage[allocation])
        return MemoryEvent(storage, num_bytes, category, phase, step, micro_batch, module, op)


# the recordings of one model name the same modules again and again
@lru_cache(maxsize=2**18)
def _module_of_iteration(module: str, iteration: int) -> str:
    return module if iteration < 0 else module.format(iteration)


def sum_work(recording: Recording) -> tuple[OperatorWork, ...]:
    """Sum the work over all modules, by step, micro-batch, phase, operator and dtype."""
    sums: dict[tuple[int, int, Phase, str, str], list[int]] = {}
    for work in recording.work:
        total = sums.setdefault(
            (work.step, work.micro_batch, work.phase, work.op, work.dtype), [0, 0, 0]
        )
        for i, number in enumerate(work.sums):
            total[i] += number
    return tuple(OperatorWork(*key, *total) for key, total in sums.items())
