"""Store tokenised samples once, in an Arrow file that is memory-mapped.

A table is a directory of the cache, named by a hash of everything that its content depends on. It
is written under a temporary name and renamed as a whole, so an existing table is complete. A lock
lets one process write while the others wait.
"""

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import platformdirs
import pyarrow
import xxhash

from fitune.boundary import parse_json
from fitune.errors import DataError
from fitune.units import MIB

_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("span_starts", pyarrow.list_(pyarrow.int32())),
        ("span_ends", pyarrow.list_(pyarrow.int32())),
        ("span_weights", pyarrow.list_(pyarrow.float32())),
        ("full_length", pyarrow.int32()),
        ("num_supervised", pyarrow.int32()),
        ("digest", pyarrow.uint64()),
        ("source", pyarrow.int16()),
        ("chosen_tokens", pyarrow.int32()),
        ("label", pyarrow.int8()),
    ]
)
_ROWS = "rows.arrow"
_FACTS = "facts.json"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One sample as it is written into a table."""

    #: cut to max_length; empty if the sample is dropped
    input_ids: Sequence[int]
    #: the supervised ranges as (start, end, weight)
    spans: Sequence[tuple[int, int, float]]
    #: tokens before the cut; of a pair those of its longer sequence
    full_length: int
    #: a hash of the row's content
    digest: int
    #: the number of its source
    source: int
    #: of a pair the tokens of its chosen sequence, which come first; else 0
    chosen_tokens: int = 0
    #: 1 of a desirable answer, 0 of one that is not, -1 where there is no such label
    label: int = -1


@dataclass(frozen=True, slots=True)
class _Column:
    """A list column of one record batch, as two memory-mapped arrays."""

    offsets: npt.NDArray[np.int32]
    values: npt.NDArray[Any]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The samples of a table, mapped into memory, and the facts that were written with them."""

    #: stored tokens of each sample, 0 if it is dropped
    lengths: npt.NDArray[np.int32]
    full_lengths: npt.NDArray[np.int32]
    num_supervised: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint64]
    sources: npt.NDArray[np.int16]
    chosen_tokens: npt.NDArray[np.int32]
    #: as in `TableRow`
    labels: npt.NDArray[np.int8]
    #: a hash of all samples
    digest: str
    #: what `write` returned when the table was made
    facts: dict[str, Any]
    #: the first sample of each record batch
    starts: list[int]
    #: for each record batch its list columns: ids, and starts, ends and weights of the spans
    columns: list[tuple[_Column, ...]]

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return input_ids [length] and loss_weights [length] of one sample, copied."""
        number = bisect_right(self.starts, index) - 1
        ids, starts, ends, weights = (
            column[index - self.starts[number]] for column in self.columns[number]
        )
        loss_weights = np.zeros(len(ids), np.float32)
        for start, end, weight in zip(starts, ends, weights, strict=True):
            loss_weights[start:end] = weight
        return ids.copy(), loss_weights


def cached_table(key: object, write: Callable[["TableWriter"], dict[str, Any]]) -> Table:
    """Return the table of `key`, any value that JSON can represent.

    If there is none, `write` writes its samples and returns its facts. The cache is in
    FITUNE_CACHE, or else in the user's cache directory. Raises DataError if it cannot be written.
    """
    name = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    root = Path(os.environ.get("FITUNE_CACHE") or platformdirs.user_cache_path("fitune")) / "data"
    try:
        if (table := _open(root / name)) is not None:
            return table
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{name}.lock"):
            if (table := _open(root / name)) is not None:
                return table
            unfinished = root / f"{name}.unfinished"
            # Left by a process that was killed, or damaged since it was written.
            for remains in (unfinished, root / name):
                shutil.rmtree(remains, ignore_errors=True)
            unfinished.mkdir()
            _write(unfinished, write)
            unfinished.rename(root / name)
    except OSError as error:
        raise DataError(
            f"the cache of tokenised samples cannot be written to {root}: {error}; FITUNE_CACHE names another place"
        ) from error
    table = _open(root / name)
    assert table is not None
    return table


class TableWriter:
    """Appends samples to the file of a table, one record batch at a time."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._hash = blake2b(digest_size=16)

    def append(self, rows: Sequence[TableRow]) -> None:
        spans = [row.spans for row in rows]
        chosen_tokens = np.array([row.chosen_tokens for row in rows], np.int32)
        labels = np.array([row.label for row in rows], np.int8)
        batch = pyarrow.record_batch(
            [
                _list_array([row.input_ids for row in rows], np.int32),
                _list_array([[start for start, _, _ in row] for row in spans], np.int32),
                _list_array([[end for _, end, _ in row] for row in spans], np.int32),
                _list_array([[weight for _, _, weight in row] for row in spans], np.float32),
                np.array([row.full_length for row in rows], np.int32),
                np.array([sum(end - start for start, end, _ in row) for row in spans], np.int32),
                np.array([row.digest for row in rows], np.uint64),
                np.array([row.source for row in rows], np.int16),
                chosen_tokens,
                labels,
            ],
            schema=_SCHEMA,
        )
        for column in batch.columns[:4]:
            for part in (column.offsets, column.values):
                self._hash.update(part.to_numpy().tobytes())
        if chosen_tokens.any():
            self._hash.update(chosen_tokens.tobytes())
        if (labels >= 0).any():
            self._hash.update(labels.tobytes())
        self._sink.write_batch(batch)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _write(directory: Path, write: Callable[[TableWriter], dict[str, Any]]) -> None:
    with (
        pyarrow.OSFile(str(directory / _ROWS), "wb") as file,
        pyarrow.ipc.new_file(file, _SCHEMA) as sink,
    ):
        writer = TableWriter(sink)
        facts = write(writer)
    # JSON changes some values (tuples become lists), so the hash is taken of what will be read.
    record = json.loads(json.dumps({"digest": writer.digest, "facts": facts}))
    hashes = {"rows_hash": _file_hash(directory / _ROWS), "facts_hash": _facts_hash(record)}
    (directory / _FACTS).write_text(json.dumps(record | hashes), encoding="utf-8")
    for name in (_ROWS, _FACTS):
        with (directory / name).open("rb") as written:
            os.fsync(written.fileno())


def _open(directory: Path) -> Table | None:
    """Return the table in a directory; None if it is missing, or its files are not as written."""
    try:
        record = parse_json((directory / _FACTS).read_text(encoding="utf-8"))
        if record["facts_hash"] != _facts_hash(record):
            return None
        if record["rows_hash"] != _file_hash(directory / _ROWS):
            return None
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(directory / _ROWS)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        digest, facts = record["digest"], record["facts"]
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        pyarrow.ArrowException,
    ):
        return None
    columns = [
        tuple(
            _Column(column.offsets.to_numpy(), column.values.to_numpy())
            for column in batch.columns[:4]
        )
        for batch in batches
    ]
    return Table(
        lengths=_joined((np.diff(ids.offsets) for ids, *_ in columns), np.int32),
        full_lengths=_joined((batch["full_length"].to_numpy() for batch in batches), np.int32),
        num_supervised=_joined((batch["num_supervised"].to_numpy() for batch in batches), np.int32),
        digests=_joined((batch["digest"].to_numpy() for batch in batches), np.uint64),
        sources=_joined((batch["source"].to_numpy() for batch in batches), np.int16),
        chosen_tokens=_joined((batch["chosen_tokens"].to_numpy() for batch in batches), np.int32),
        labels=_joined((batch["label"].to_numpy() for batch in batches), np.int8),
        digest=digest,
        facts=facts,
        starts=[0, *np.cumsum([batch.num_rows for batch in batches]).tolist()][:-1],
        columns=columns,
    )


def _facts_hash(record: Mapping[str, Any]) -> str:
    content = json.dumps([record["digest"], record["facts"]], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(content.encode())


def _file_hash(path: Path) -> str:
    # The file is hashed before each use, since a flipped bit would be trained on. It takes no
    # longer than the disk takes to read the file.
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(16 * MIB):
            digest.update(piece)
    return digest.hexdigest()


def _joined(parts: Iterable[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _list_array(lists: Sequence[Sequence[Any]], dtype: type) -> object:
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(row) for row in lists], out=offsets[1:])
    values = np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in lists)])
    return pyarrow.ListArray.from_arrays(offsets, values)
