"""Reads and writes eval_rows.jsonl: each evaluation with the loss of each held-out sample.

So two runs can be compared in pairs of the same samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.plain_files import MAX_LOG_BYTES, read_plain
from fitune.run.metrics import append_line


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRows:
    """One evaluation, sample by sample in the order of the held-out data."""

    step: int
    total_tokens: int
    #: the mean over the supervised tokens of each sample; 0 for a sample without any
    losses: tuple[float, ...]
    #: the sum of each sample's loss weights; 0 for a sample without supervised tokens
    weights: tuple[float, ...]


def append_eval_rows(
    path: Path, rows: EvalRows, *, append: Callable[[Path, EvalRows], None] = append_line
) -> None:
    """Write an evaluation, unless its loss is not finite.

    append: writes a line.

    Raises RunDirectoryError like `append_line`.
    """
    if all(map(math.isfinite, rows.losses)):
        append(path, rows)


def read_eval_rows(path: Path) -> tuple[EvalRows, ...]:
    """Read the evaluations by step; if a step was evaluated twice, the last one counts.

    Damaged lines are skipped. Raises RunDirectoryError if the file cannot be read.
    """
    found: dict[int, EvalRows] = {}
    try:
        lines = read_plain(path, most_bytes=MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            content = parse_json(line)
            losses, weights = (tuple(map(float, content[name])) for name in ("losses", "weights"))
            step, total_tokens = int(content["step"]), int(content["total_tokens"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if len(losses) == len(weights):
            found[step] = EvalRows(
                step=step, total_tokens=total_tokens, losses=losses, weights=weights
            )
    return tuple(found[step] for step in sorted(found))
