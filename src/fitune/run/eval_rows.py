"""eval_rows.jsonl: each evaluation row by row, so that two runs can be compared in pairs of the same held-out rows."""

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
    """losses: the mean over the supervised tokens of each held-out row, in the order of the rows; weights: the sums of
    their tokens' loss weights. A row without supervised token has loss 0 and weight 0."""

    step: int
    total_tokens: int
    losses: tuple[float, ...]
    weights: tuple[float, ...]


def append_eval_rows(
    path: Path, rows: EvalRows, *, append: Callable[[Path, EvalRows], None] = append_line
) -> None:
    """Nothing is written of an evaluation whose loss is not finite. append: what writes a line. Raises
    RunDirectoryError as `append_line`."""
    if all(map(math.isfinite, rows.losses)):
        append(path, rows)


def read_eval_rows(path: Path) -> tuple[EvalRows, ...]:
    """By step; of a step that was evaluated twice the last time. Damaged lines are left out. Raises RunDirectoryError
    where the file cannot be read."""
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
