"""A recorded loop as columns: births in order, each with the place of its death, and what the operators did.

In this form a recording can be made longer without being recorded again (`extrapolate`). `to_trace` writes it as the
events that it stands for.

Turns: most of a step is a loop over layers, or over the chunks of a loss. What belongs to the third turn of a loop says
so by its module: model.layers.2.mlp is turn 2 of the loop model.layers.
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

from fitune.trace.events import (
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
NEVER = -1
COLUMNS = ("num_bytes", "label", "loop", "turn", "dies_after", "death_loop", "death_turn", "rule")
_TURN = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class Where(NamedTuple):
    """When and where something happens; module as in `MemoryEvent`."""

    phase: Phase
    step: int
    micro_batch: int
    module: str


class Rule(NamedTuple):
    """A temporary that is computed from the shapes of an operator's arguments: number `position` of the `total`
    that the rule of `op` gives for `arguments`, tensors written as (shape, dtype)."""

    op: str
    arguments: tuple[object, ...]
    position: int
    total: int


class Birth(NamedTuple):
    """dies_after: the place in the order of births of the last one before its death, or NEVER."""

    num_bytes: int
    category: Category
    where: Where
    op: str
    dies_after: int
    death: Where | None
    rule: Rule | None = None


class TraceWork(NamedTuple):
    """All calls of an operator in one place; the last three are sums."""

    phase: Phase
    step: int
    micro_batch: int
    loop: str
    turn: int
    op: str
    dtype: str
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
    """What equal births have in common. The modules have {} for the number of the turn."""

    category: Category
    where: Where
    op: str
    death: Where | None


@dataclass(frozen=True)
class Recording:
    """Columns of one length, a row for each birth. num_bytes: 0 where the allocator's cache is emptied. label: index
    into labels. loop: index into loops, -1 outside; turn: in that loop. dies_after: as in `Birth`. death_loop and
    death_turn: of the module that runs at the death. rule: index into rules, or -1. silent:
    (step, rule) of operators whose rules gave nothing. source: as in `MemoryTrace`."""

    labels: tuple[Label, ...]
    loops: tuple[str, ...]
    rules: tuple[Rule, ...]
    num_bytes: Integers
    label: Integers
    loop: Integers
    turn: Integers
    dies_after: Integers
    death_loop: Integers
    death_turn: Integers
    rule: Integers
    silent: tuple[tuple[int, Rule], ...]
    work: tuple[TraceWork, ...]
    source: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.num_bytes)


def split_turn(module: str) -> tuple[str, int, str]:
    """(the module with {} for its turn, the turn, the loop): the first number in the path counts the turns; ('', -1)
    for a module outside of loops."""
    found = _TURN.search(module)
    if found is None:
        return module, -1, ""
    start, end = found.span(1)
    return f"{module[:start]}{{}}{module[end:]}", int(found[1]), module[: max(start - 1, 0)] or "."


def make_recording(
    births: Iterable[Birth],
    work: Iterable[TraceWork],
    *,
    silent: Iterable[tuple[int, Rule]] = (),
    source: Sequence[str] = (),
) -> Recording:
    labels: dict[Label, int] = {}
    loops: dict[str, int] = {"": -1}
    rules: dict[Rule, int] = {}
    rows: list[tuple[int, ...]] = []
    split: dict[str, tuple[str, int, int]] = {}

    def place(module: str) -> tuple[str, int, int]:
        if module not in split:
            template, turn, loop = split_turn(module)
            split[module] = template, turn, loops.setdefault(loop, len(loops) - 1)
        return split[module]

    for birth in births:
        module, turn, loop = place(birth.where.module)
        death, death_turn, death_loop = birth.death, -1, -1
        if death is not None:
            death_module, death_turn, death_loop = place(death.module)
            death = death._replace(module=death_module)
        label = Label(birth.category, birth.where._replace(module=module), birth.op, death)
        rule = -1 if birth.rule is None else rules.setdefault(birth.rule, len(rules))
        rows.append(
            (
                *(birth.num_bytes, labels.setdefault(label, len(labels)), loop, turn),
                *(birth.dies_after, death_loop, death_turn, rule),
            )
        )
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    return Recording(
        labels=tuple(labels),
        loops=tuple(loops)[1:],
        rules=tuple(rules),
        **dict(zip(COLUMNS, columns, strict=True)),
        silent=tuple(dict.fromkeys(silent)),
        work=tuple(work),
        source=tuple(source),
    )


def to_trace(recording: Recording) -> MemoryTrace:
    return MemoryTrace(RecordedEvents(recording), (*recording.source, _versions()))


@cache
def _versions() -> str:
    """What was recorded is the code of these: it differs from version to version, and memory with it."""
    found = {}
    for package in ("torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    rest = [f"{package} {number}" for package, number in found.items() if package != "torch"]
    return f"{VERSIONS}{', '.join([found.get('torch', 'n/a'), *rest])}: others differ by 1 to 2 %"


class RecordedEvents(Sequence[MemoryEvent]):
    """The events of a recording, made when they are looked at. Deaths with no birth in between are in the order of the
    births: it makes no difference to an allocator."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        births = np.arange(len(recording))
        dying = np.flatnonzero(recording.dies_after != NEVER)
        # a birth stands at twice its number, what dies after it behind it
        at = np.concatenate([2 * births, 2 * recording.dies_after[dying] + 1])
        order = np.argsort(at, kind="stable")
        self._birth = np.concatenate([births, dying])[order]
        self._dies = (np.arange(len(at)) >= len(births))[order]
        born = recording.num_bytes > 0
        self._storage = np.cumsum(born) * born

    def columns(self) -> EventColumns:
        return self._columns

    @cached_property
    def _columns(self) -> EventColumns:
        recording, birth = self._recording, self._birth
        label = recording.label[birth]
        steps = np.array(
            [(each.where.step, (each.death or each.where).step) for each in recording.labels], dtype=np.int64
        )
        categories = np.array([CATEGORIES.index(each.category) for each in recording.labels], dtype=np.int64)
        return EventColumns(
            storage=self._storage[birth],
            num_bytes=np.where(self._dies, -1, 1) * recording.num_bytes[birth],
            step=steps.reshape(-1, 2)[label, self._dies.astype(np.int64)],
            stream=np.zeros(len(birth), dtype=np.int64),
            category=categories[label],
        )

    def modules(self, indices: Integers) -> tuple[list[str], Integers]:
        """As `MemoryTrace.modules`."""
        recording, birth = self._recording, self._birth[indices]
        num_turns = int(recording.turn.max(initial=0)) + 2
        places, which = np.unique(recording.label[birth] * num_turns + recording.turn[birth] + 1, return_inverse=True)
        modules = [each.where.module for each in recording.labels]
        labels_and_turns = (divmod(place, num_turns) for place in places.tolist())
        return [_in_turn(modules[label], turn - 1) for label, turn in labels_and_turns], which

    def __len__(self) -> int:
        return len(self._birth)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    @overload
    def __getitem__(self, index: int) -> MemoryEvent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[MemoryEvent, ...]: ...
    def __getitem__(self, index: int | slice) -> MemoryEvent | tuple[MemoryEvent, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        recording, birth = self._recording, int(self._birth[index])
        category, where, op, death = recording.labels[recording.label[birth]]
        num_bytes, turn = int(recording.num_bytes[birth]), recording.turn[birth]
        if self._dies[index]:
            assert death is not None
            where, num_bytes, turn = death, -num_bytes, recording.death_turn[birth]
        phase, step, micro_batch, module = where
        module = _in_turn(module, int(turn))
        return MemoryEvent(int(self._storage[birth]), num_bytes, category, phase, step, micro_batch, module, op)


@lru_cache(maxsize=2**18)  # the recordings of one model name the same modules again and again
def _in_turn(module: str, turn: int) -> str:
    return module if turn < 0 else module.format(turn)


def sum_work(recording: Recording) -> tuple[OperatorWork, ...]:
    """By step, micro-batch, phase, operator and format, over all modules."""
    sums: dict[tuple[int, int, Phase, str, str], list[int]] = {}
    for work in recording.work:
        total = sums.setdefault((work.step, work.micro_batch, work.phase, work.op, work.dtype), [0, 0, 0])
        for i, number in enumerate(work.sums):
            total[i] += number
    return tuple(OperatorWork(*key, *total) for key, total in sums.items())
