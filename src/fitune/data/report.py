"""What the data is, in numbers: the report that comes with the examples and that `fitune check` shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fitune.data.order import shuffled


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not trained on. line: from 1; the row's number where its format has no lines."""

    path: str
    line: int
    reason: str


def grouped(rows: Sequence[BadRow]) -> list[str]:
    """One sentence for the rows of a file that have the same reason."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        lines.setdefault((row.path, row.reason), []).append(row.line)
    return [
        f"{path}, line{'s' if len(numbers) > 1 else ''} {', '.join(f'{number}' for number in numbers)}: {reason}"
        for (path, reason), numbers in lines.items()
    ]


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was read of one source. formats: usually one; a directory may hold files of several."""

    path: str
    formats: tuple[str, ...]
    num_rows: int
    num_bad_rows: int


@dataclass(frozen=True, slots=True)
class LengthQuantiles:
    """Tokens of a row before it is cut."""

    p50_tokens: int
    p95_tokens: int
    p99_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PaddingReport:
    """Positions computed for each real token, under four ways to lay rows out. fixed: each row padded to max_length.
    shuffled and sorted: groups of 8 rows padded to their longest, in random order and by length over the whole data.
    packed: rows one after another, without padding."""

    fixed: float
    shuffled: float
    sorted: float
    packed: float


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One side of the held-out split. Token counts are of the rows as they are trained on: cut, none dropped.

    num_long_rows: longer than max_length, which are cut, or dropped with data.too_long=drop.
    num_untrainable_rows: dropped, because no supervised token is left after the cut.
    """

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    quantiles: LengthQuantiles | None
    num_long_rows: int
    num_untrainable_rows: int
    num_duplicate_rows: int
    padding: PaddingReport | None


@dataclass(frozen=True, slots=True)
class DataReport:
    """sources: of train, then of eval where data.eval names some. num_rows counts the rows read, the bad ones included;
    bad_rows and dropped_rows list the first of each. train and eval: the two sides of the split. date: the one that the
    chat template writes into the rows, None where it writes none. ends: the tokens that answers end with."""

    sources: tuple[SourceReport, ...]
    template: str
    mask: str
    date: str | None
    ends: tuple[str, ...]
    max_length: int
    num_rows: int
    num_bad_rows: int
    bad_rows: tuple[BadRow, ...]
    dropped_rows: tuple[BadRow, ...]
    train: SplitReport
    eval: SplitReport
    warnings: tuple[str, ...]

    @property
    def supervised_fraction(self) -> float:
        """Of the training tokens, those that carry loss."""
        return (
            self.train.num_supervised_tokens / self.train.num_tokens
            if self.train.num_tokens
            else 0.0
        )


def length_quantiles(lengths_R: npt.NDArray[np.int32]) -> LengthQuantiles | None:
    """Quantiles that are lengths of real rows, None of no rows."""
    if not len(lengths_R):
        return None
    p50, p95, p99 = (
        int(q) for q in np.quantile(lengths_R, (0.5, 0.95, 0.99), method="inverted_cdf")
    )
    return LengthQuantiles(p50, p95, p99, int(lengths_R.max()))


def padding_report(lengths_R: npt.NDArray[np.int32], max_length: int) -> PaddingReport | None:
    """lengths_R: of the rows as trained on. None of no rows."""
    num_tokens = int(lengths_R.sum(dtype=np.int64))
    if not num_tokens:
        return None
    return PaddingReport(
        fixed=len(lengths_R) * max_length / num_tokens,
        shuffled=_padded_tokens(lengths_R[shuffled(len(lengths_R))]) / num_tokens,
        sorted=_padded_tokens(np.sort(lengths_R)) / num_tokens,
        packed=1.0,
    )


def length_histogram(
    lengths_R: npt.NDArray[np.int32], max_length: int, *, num_bins: int = 40
) -> dict[str, list[int]]:
    """How many rows have how many tokens: `counts[i]` rows of at least `edges[i]` and less than `edges[i + 1]`, the
    last bin with both its edges."""
    edges = np.unique(np.linspace(1, max(max_length, 2), num_bins + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths_R, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _padded_tokens(lengths_R: npt.NDArray[np.int32], rows: int = 8) -> int:
    starts = np.arange(0, len(lengths_R), rows)
    longest = np.maximum.reduceat(lengths_R, starts).astype(np.int64)
    return int((longest * np.diff([*starts, len(lengths_R)])).sum())
