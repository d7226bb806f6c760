"""Reads and writes the journal: which samples each step saw, how they were split, and the result.

Together with seed, data and configuration it is everything that a run is a function of. So a run
can be replayed from it, and two runs can be compared up to the first step where they differ.

Each line has a hash of itself and of the line before. Memory and time (attempts, bytes, seconds)
are in the line but not in the hash: a run that was killed and resumed ends with the same hash as
one that was not. The chain begins with `CHAIN_START`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fitune.errors import RunDirectoryError
from fitune.run.metrics import append_line, read_lines

CHAIN_START = "0" * 16
Plan = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One consumed batch, as far as seed, data, configuration and plan decide it."""

    #: optimizer steps after the batch, one more than before unless the batch had no target
    step: int
    #: samples consumed after the batch
    position: int
    #: of the row ids in the sampler's order, as `ids_hash` makes it
    ids_hash: str
    #: N, the sum of the batch's loss weights
    loss_weight: float
    #: the row ids of each micro-batch, in the order of computation; several processes follow each
    #: other, separated by an empty micro-batch (`plan_parts`)
    plan: Plan
    lr: float
    #: None if N is 0
    loss_sum: float | None
    #: before clipping; None if N is 0
    grad_norm: float | None
    #: whether the weights changed
    updated: bool
    #: the fallbacks in force beyond the configuration, by process; empty if there are none
    reliefs: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLine(StepRecord):
    """A step record with its measurements and its place in the chain."""

    #: how often the step was begun; 1 if nothing failed
    attempts: int = 1
    #: of the device; None if the device does not report it
    peak_bytes: int | None = None
    free_bytes: int | None = None
    seconds: float
    hash: str


def plan_parts(plan: Plan) -> tuple[Plan, ...]:
    """Split a plan into those of the processes, by rank; it has one part for one process."""
    borders = [-1, *(place for place, row_ids in enumerate(plan) if not row_ids), len(plan)]
    return tuple(plan[before + 1 : after] for before, after in pairwise(borders))


def ids_hash(row_ids: Sequence[int]) -> str:
    """Hash row ids to 16 hexadecimal digits."""
    return blake2b(np.array(row_ids, "<i8").tobytes(), digest_size=8).hexdigest()


def chained_hash(previous: str, record: StepRecord) -> str:
    """Hash `previous` and all fields of a StepRecord to 16 hexadecimal digits.

    Floats are hashed with all their bits.
    """
    content = [previous, *(getattr(record, field.name) for field in fields(StepRecord))]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def append_step(
    path: Path | None,
    previous: str,
    record: StepRecord,
    *,
    append: Callable[[Path, JournalLine], None] = append_line,
    **measured: Any,
) -> str:
    """Append a step to the journal, and return its hash.

    path: None in a process that does not write.
    append: writes a line.
    measured: the fields that only a JournalLine has, except `hash`.

    Raises RunDirectoryError if the line cannot be written as a whole.
    """
    link = chained_hash(previous, record)
    values = {field.name: getattr(record, field.name) for field in fields(StepRecord)}
    if path is not None:
        append(path, JournalLine(**values, **measured, hash=link))
    return link


def read_journal(path: Path) -> tuple[JournalLine, ...]:
    """Read every line and verify the chain.

    Raises RunDirectoryError if the file cannot be opened, a line cannot be read, or a line does not
    continue the one before.
    """
    lines = tuple(_read(path))
    hashes = [CHAIN_START, *(line.hash for line in lines)]
    for number, (line, (previous, link)) in enumerate(
        zip(lines, pairwise(hashes), strict=True), start=1
    ):
        if chained_hash(previous, line) != link:
            raise RunDirectoryError(
                f"{path}:{number}: step {line.step} does not follow from the line before it: the journal was changed "
                "or has lost lines, and this run cannot be replayed beyond that"
            )
    return lines


def _read(path: Path) -> Iterator[JournalLine]:
    for number, content in read_lines(path):
        try:
            yield _line({} if content is None else content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunDirectoryError(
                f"{path}:{number} is not a line of a journal ({error!r})"
            ) from error


def _line(content: Mapping[str, Any]) -> JournalLine:
    values = {field.name: content[field.name] for field in fields(JournalLine)}
    values["plan"] = tuple(tuple(int(row_id) for row_id in row_ids) for row_ids in content["plan"])
    values["reliefs"] = tuple(tuple(map(str, names)) for names in content["reliefs"])
    for name in ("loss_sum", "grad_norm"):  # a number that is not finite is written as text
        values[name] = None if content[name] is None else float(content[name])
    return JournalLine(**values)
