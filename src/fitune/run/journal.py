"""What each step did: the rows it saw, how they were split, what came out. With (seed, data, configuration) it is all
that a run is a function of, so a run can be replayed from it and two runs can be told apart at the first step where
they differ.

Each line carries a hash of itself and of the line before it. What the memory and the clock did (attempts, bytes,
seconds) stands in the line but not in the hash: a run that was killed and resumed ends with the hash of one that was
not. The chain starts at `CHAIN_START`.
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
    """One batch that was consumed, as far as it is decided by seed, data, configuration and plan.

    step: optimizer steps after it, one more than before unless the batch had no target. position: samples consumed
    after it. ids_hash: of its row ids in the sampler's order, as `ids_hash` makes it. loss_weight: N. plan: the row ids
    of each micro-batch, in the order in which they were computed; of several processes one after another, with an empty
    micro-batch between them (`plan_parts`). loss_sum and grad_norm (before clipping): None where
    N is 0. updated: whether the weights moved. reliefs: what saved memory beyond the configuration, by process; empty
    where nothing did.
    """

    step: int
    position: int
    ids_hash: str
    loss_weight: float
    plan: Plan
    lr: float
    loss_sum: float | None
    grad_norm: float | None
    updated: bool
    reliefs: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLine(StepRecord):
    """A step record with what it took and its place in the chain. attempts: how often the step was begun, 1 where
    nothing failed. peak_bytes, free_bytes: of the device, None where it does not tell them."""

    attempts: int = 1
    peak_bytes: int | None = None
    free_bytes: int | None = None
    seconds: float
    hash: str


def plan_parts(plan: Plan) -> tuple[Plan, ...]:
    """A plan -> that of each process, by rank; one part where there was one process."""
    borders = [-1, *(place for place, row_ids in enumerate(plan) if not row_ids), len(plan)]
    return tuple(plan[before + 1 : after] for before, after in pairwise(borders))


def ids_hash(row_ids: Sequence[int]) -> str:
    """16 hexadecimal digits."""
    return blake2b(np.array(row_ids, "<i8").tobytes(), digest_size=8).hexdigest()


def chained_hash(previous: str, record: StepRecord) -> str:
    """16 hexadecimal digits of `previous` and of every field of a StepRecord; floats with all their bits."""
    content = [previous, *(getattr(record, field.name) for field in fields(StepRecord))]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def append_step(
    path: Path | None,
    previous: str,
    record: StepRecord,
    *,
    append: Callable[[Path, JournalLine], None] = append_line,
    **taken: Any,
) -> str:
    """Append the record with the fields that only a JournalLine has, but for `hash`, which is returned. path: None in a
    process beside the one that writes. append: what writes a line.

    Raises RunDirectoryError where the line cannot be written whole.
    """
    link = chained_hash(previous, record)
    values = {field.name: getattr(record, field.name) for field in fields(StepRecord)}
    if path is not None:
        append(path, JournalLine(**values, **taken, hash=link))
    return link


def read_journal(path: Path) -> tuple[JournalLine, ...]:
    """Every line, the chain verified. Raises RunDirectoryError where the file cannot be opened, a line cannot be read
    or is not the one that followed the line before it."""
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
