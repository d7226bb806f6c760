"""Build the data report from the tables of both sides of the held-out split."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fitune.config import DataConfig
from fitune.data.files import split_sample
from fitune.data.notices import grouped_notices
from fitune.data.report import (
    BadRow,
    DataReport,
    SourceReport,
    SplitReport,
    length_quantiles,
    padding_report,
)
from fitune.data.splits import other_splits
from fitune.data.table import Table


def data_report(
    data: DataConfig,
    train: tuple[Table, npt.NDArray[np.int64]],
    eval: tuple[Table, npt.NDArray[np.int64]],
) -> DataReport:
    """Return the report on what was read, with its warnings.

    train, eval: the table of each side, and which of its rows belong to that side.
    """
    tables = [train[0]] if eval[0] is train[0] else [train[0], eval[0]]
    facts = [table.facts for table in tables]
    sources = tuple(
        SourceReport(**source | {"formats": tuple(source["formats"])})
        for f in facts
        for source in f["sources"]
    )
    noticed = sum((Counter(f["noticed"]) for f in facts), Counter[str]())
    train_report, eval_report = (
        _split_report(*train, data.max_length),
        _split_report(*eval, data.max_length),
    )
    return DataReport(
        sources=sources,
        template=facts[0]["template"],
        mask=facts[0]["mask"],
        date=facts[0]["date"],
        begins=tuple(sorted({token for f in facts for token in f["begins"]})),
        ends=tuple(sorted({end for f in facts for end in f["ends"]})),
        max_length=data.max_length,
        num_rows=sum(source.num_rows for source in sources),
        num_bad_rows=sum(source.num_bad_rows for source in sources),
        bad_rows=tuple(BadRow(**row) for f in facts for row in f["bad_rows"]),
        dropped_rows=tuple(BadRow(**row) for f in facts for row in f["dropped_rows"]),
        train=train_report,
        eval=eval_report,
        warnings=(
            *grouped_notices(noticed),
            *_split_warnings(data, train, eval),
            *_other_split_warnings(data),
            *(
                f"{source.path} gives no sample: data.max_rows is reached before it"
                for source in sources
                if not source.num_rows
            ),
        ),
    )


def _split_report(table: Table, rows: npt.NDArray[np.int64], max_length: int) -> SplitReport:
    lengths, full_lengths = table.lengths[rows], table.full_lengths[rows]
    is_trained = lengths > 0
    # Of a text that is split into several samples, the first alone has its full length.
    full_lengths, is_first = full_lengths[full_lengths > 0], full_lengths > 0
    digests = table.digests[rows][is_trained & is_first]
    return SplitReport(
        num_rows=int(is_trained.sum()),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        num_supervised_tokens=int(table.num_supervised[rows].sum(dtype=np.int64)),
        quantiles=length_quantiles(full_lengths),
        num_long_rows=int((full_lengths > max_length).sum()),
        num_untrainable_rows=int((~is_trained).sum()),
        num_duplicate_rows=len(digests) - len(np.unique(digests)),
        padding=padding_report(lengths[is_trained], max_length),
    )


def _other_split_warnings(data: DataConfig) -> Iterator[str]:
    """Yield a warning for each split in a source's directory that the source is not used for."""
    for source in data.train_sources:
        for name, count in other_splits(split_sample(source.path)[0]).items():
            what = (
                f"{count:,} files of the split {name}"
                if name
                else f"{count:,} files whose names tell no split"
            )
            hint = (
                f": data.eval={source.path} evaluates with them"
                if name and data.eval is None
                else ""
            )
            yield f"{source.path} holds {what}, not used for training{hint}"
    for source in data.eval_sources or ():
        for name, count in other_splits(split_sample(source.path)[0], split="eval").items():
            if name in ("validation", "test"):
                yield (
                    f"{source.path} holds {count:,} files of the split {name}, not used for evaluation"
                )


def _split_warnings(
    data: DataConfig,
    train: tuple[Table, npt.NDArray[np.int64]],
    eval: tuple[Table, npt.NDArray[np.int64]],
) -> Iterator[str]:
    (train_table, train_rows), (eval_table, eval_rows) = train, eval
    num_eval = int((eval_table.lengths[eval_rows] > 0).sum())
    if data.eval_sources is None and data.eval_fraction and not num_eval:
        yield (
            "no sample is held out: the samples are too few or all alike, so there is no evaluation"
        )
    if data.eval_sources is not None:
        both = np.isin(train_table.digests[train_rows], eval_table.digests[eval_rows])
        if both.any():
            yield (
                f"{int(both.sum()):,} samples of data.train are in data.eval too, which makes the evaluation too good"
            )
