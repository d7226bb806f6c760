"""Describe the data in numbers, for the report with the examples and for `fitune check`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fitune.data.order import shuffled


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not trained on, with the reason."""

    path: str
    #: from 1; the number of the row where its format has no lines
    line: int
    reason: str


def grouped(rows: Sequence[BadRow]) -> list[str]:
    """Return one message for all rows of a file that have the same reason."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        lines.setdefault((row.path, row.reason), []).append(row.line)
    return [
        f"{path}, line{'s' if len(numbers) > 1 else ''} {', '.join(f'{number}' for number in numbers)}: {reason}"
        for (path, reason), numbers in lines.items()
    ]


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was read from one source."""

    path: str
    #: usually one; a directory may contain files of several formats
    formats: tuple[str, ...]
    num_rows: int
    num_bad_rows: int


@dataclass(frozen=True, slots=True)
class LengthQuantiles:
    """Quantiles of the samples' tokens before they are cut to max_length."""

    p50_tokens: int
    p95_tokens: int
    p99_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PaddingReport:
    """Tokens computed, padding included, for each real token under four layouts."""

    #: each sample padded to max_length
    fixed: float
    #: groups of 8 samples in random order, padded to the longest of the group
    shuffled: float
    #: groups of 8 samples sorted by length over the whole data, padded to the longest of the
    #: group
    sorted: float
    #: samples one after another, without padding
    packed: float


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One side of the held-out split.

    Token counts are those of the samples as they are trained on: after the cut to max_length.
    """

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    quantiles: LengthQuantiles | None
    #: longer than max_length: these are cut, dropped or split, as data.too_long says
    num_long_rows: int
    #: dropped because no supervised token remains after the cut
    num_untrainable_rows: int
    num_duplicate_rows: int
    padding: PaddingReport | None


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read and what is trained on."""

    #: those of train, then those of eval where data.eval names some
    sources: tuple[SourceReport, ...]
    template: str
    mask: str
    #: the date that the chat template writes into the samples, None where it writes none
    date: str | None
    #: the tokens that the tokenizer puts before plain texts
    begins: tuple[str, ...]
    #: the tokens that answers and plain texts end with
    ends: tuple[str, ...]
    max_length: int
    #: all rows that were read, including the bad ones
    num_rows: int
    num_bad_rows: int
    #: the first ones only
    bad_rows: tuple[BadRow, ...]
    #: the first ones only
    dropped_rows: tuple[BadRow, ...]
    train: SplitReport
    eval: SplitReport
    warnings: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Whether all samples are plain texts."""
        return {name for source in self.sources for name in source.formats} == {"text"}

    @property
    def supervised_fraction(self) -> float:
        """Return the fraction of the training tokens that contribute to the loss."""
        return (
            self.train.num_supervised_tokens / self.train.num_tokens
            if self.train.num_tokens
            else 0.0
        )


def length_quantiles(lengths_R: npt.NDArray[np.int32]) -> LengthQuantiles | None:
    """Return quantiles that are lengths of real samples; None if there are no samples."""
    if not len(lengths_R):
        return None
    p50, p95, p99 = (
        int(q) for q in np.quantile(lengths_R, (0.5, 0.95, 0.99), method="inverted_cdf")
    )
    return LengthQuantiles(p50, p95, p99, int(lengths_R.max()))


def padding_report(lengths_R: npt.NDArray[np.int32], max_length: int) -> PaddingReport | None:
    """Return the padding under each layout; None if there are no tokens.

    lengths_R: the samples' tokens as trained on.
    """
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
    """Return how many samples have how many tokens.

    `counts[i]` samples have at least `edges[i]` and fewer than `edges[i + 1]` tokens; the last bin
    includes both of its edges.
    """
    edges = np.unique(np.linspace(1, max(max_length, 2), num_bins + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths_R, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _padded_tokens(lengths_R: npt.NDArray[np.int32], rows: int = 8) -> int:
    starts = np.arange(0, len(lengths_R), rows)
    longest = np.maximum.reduceat(lengths_R, starts).astype(np.int64)
    return int((longest * np.diff([*starts, len(lengths_R)])).sum())
