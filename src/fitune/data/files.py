"""Read the rows of a data source one at a time, each with the file and line it stands in.

The formats are json and jsonl (data/json_files.py), parquet, csv, tsv and arrow. Text files may be
compressed (gz, zst, bz2, xz). A source may also be a directory of such files (data/splits.py) or
the id of a data set on the hub (data/hub.py).

Only the current row is in memory, so a file may be larger than memory. The exception is one JSON
object that contains all the rows ({"data": [...]}, or a list for each column): it is loaded as a
whole. A row that cannot be parsed is yielded with the reason. Whatever makes the whole file
unreadable (missing, empty, binary, a broken array) raises DataError.
"""

import csv
import lzma
import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fitune.config import DataConfig, DataSource
from fitune.data.hub import is_hub_id, load_from_hub
from fitune.data.json_files import read_json
from fitune.data.json_window import MAX_ELEMENT_CHARS
from fitune.data.order import shuffled
from fitune.data.raw_rows import RawRow, fault_of_encoding, open_bytes, open_text
from fitune.data.splits import TABLES, Split, find_files, suffix_of
from fitune.errors import DataError
from fitune.units import MIB

#: the most characters that are read of a csv file to find its delimiter
_MOST_HEADER_CHARS = MIB
#: A file of at most this size is hashed as a whole.
_SMALL_FILE_BYTES = 64 * MIB
#: the number of blocks that are hashed of a larger file
_NUM_SAMPLES = 64


def read_rows(source: DataSource, *, split: Split = "train") -> Iterator[RawRow]:
    """Yield the rows of a source in their order, at most `max_rows` of them.

    If the path ends in '#n', n rows are drawn, the same ones in every run. `split` says what the
    rows are for, where a source has several splits. Raises DataError if the source cannot be read
    at all.
    """
    path, num_sampled = split_sample(source.path)
    rows = _read_all(path, split)
    if num_sampled is not None:
        num_rows = sum(1 for _ in _read_all(path, split))
        chosen = np.zeros(num_rows, bool)
        chosen[shuffled(num_rows, num_rows)[:num_sampled]] = True
        rows = (row for row, is_chosen in zip(rows, chosen, strict=False) if is_chosen)
    return islice(rows, source.max_rows)


def split_sample(path: str) -> tuple[str, int | None]:
    """Split 'sft.jsonl#500' into ('sft.jsonl', 500).

    A file whose name really ends like this is not split. Raises DataError for '#0'.
    """
    match = re.fullmatch(r"(.+)#(\d+)", path)
    if match is None or Path(path).exists():
        return path, None
    if int(match[2]) == 0:
        raise DataError(
            f"'{path}' asks for 0 samples: give '#n' with n of at least 1, or leave it out"
        )
    return match[1], int(match[2])


def fingerprint(source: DataSource, *, split: Split = "train") -> list[object]:
    """Return values that change when the rows of a source change; they are part of the cache key.

    A file of up to 64 MiB is hashed as a whole. To hash 9 GB would delay the start too much, so a
    larger file counts as unchanged if its size, its modification time and 64 blocks spread over it
    are the same. The modification time detects edits in place; the blocks detect another file that
    was moved there with its old modification time.
    """
    path, _ = split_sample(source.path)
    if is_hub_id(path):
        return [source.path, source.max_rows, load_from_hub(path, split)._fingerprint]
    return [
        source.path,
        source.max_rows,
        *((str(file), _file_hash(file)) for file in find_files(path, split=split)),
    ]


def check_files(data: DataConfig) -> None:
    """Raise DataError if a path that the configuration names does not exist."""
    for source in data.train_sources:
        _check_path(source.path, "train")
    for source in data.eval_sources or ():
        _check_path(source.path, "eval")


def _check_path(path: str, split: Split) -> None:
    path, _ = split_sample(path)
    if not is_hub_id(path):
        find_files(path, split=split)


def _read_all(path: str, split: Split) -> Iterator[RawRow]:
    if is_hub_id(path):
        yield from (
            RawRow(path, line, row) for line, row in enumerate(load_from_hub(path, split), 1)
        )
        return
    for file in find_files(path, split=split):
        num_rows = 0
        for num_rows, row in enumerate(_read_file(file), 1):  # noqa: B007
            yield row
        if num_rows == 0:
            raise DataError(f"{file} is empty: it holds no sample")


def _read_file(path: Path) -> Iterator[RawRow]:
    suffix = suffix_of(path)
    if suffix in (".parquet", ".arrow") and not _is_pointer(path):
        return _read_parquet(path) if suffix == ".parquet" else _read_arrow(path)
    try:
        with open_bytes(path) as file:
            head = file.read(8192)
            if head.startswith(b"version https://git-lfs"):
                raise DataError(
                    f"{path} is a pointer of Git LFS, not the data itself: fetch that with 'git lfs pull'"
                )
            if head[:4] == b"\xff\xfe\0\0" or head[:4] == b"\0\0\xfe\xff":
                raise DataError(
                    f"{path} is in UTF-32: write it in UTF-8, as 'iconv -f UTF-32 -t UTF-8' does"
                )
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(
                    f"{path} is in UTF-16: write it in UTF-8, as 'iconv -f UTF-16 -t UTF-8' does"
                )
            if b"\0" in head:
                raise DataError(
                    f"{path} is no text file (it holds zero bytes): give UTF-8 text or a .parquet file"
                )
            while not head.strip(b"\xef\xbb\xbf \t\r\n") and (more := file.read(8192)):
                head = more
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return _read_text(path, suffix, head.lstrip(b"\xef\xbb\xbf \t\r\n"))


def _is_pointer(path: Path) -> bool:
    """Return whether the file is a pointer of Git LFS in place of the data."""
    try:
        with path.open("rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except OSError:
        return False


def _read_text(path: Path, suffix: str, head: bytes) -> Iterator[RawRow]:
    """Yield the rows of a text file in the format that its first bytes show.

    head: the first bytes of the file without the byte order mark and white space.

    Raises DataError if the file cannot be read or decompressed.
    """
    try:
        if suffix in TABLES:
            yield from _read_csv(path, "\t" if suffix == ".tsv" else None)
        else:
            yield from read_json(path, head)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _read_csv(path: Path, delimiter: str | None) -> Iterator[RawRow]:
    """Yield the rows of a csv file as mappings from column name to text.

    Cells of 'nan', which pandas writes for a missing value, become None. If `delimiter` is None, it
    is found in the header. Raises DataError if two columns have the same name or the csv is broken.
    """
    csv.field_size_limit(MAX_ELEMENT_CHARS)
    with open_text(path) as file:
        with open_text(path) as beginning:
            header = beginning.readline(_MOST_HEADER_CHARS)
        if delimiter is None:
            delimiter = next((mark for mark in ",\t;|" if mark in header), ",")
        has_spaces = f"{delimiter} " in header
        reader = csv.DictReader(file, strict=True, delimiter=delimiter, skipinitialspace=has_spaces)
        try:
            names = list(reader.fieldnames or ())
            if twice := next(
                (name for name in names if name.strip() and names.count(name) > 1), None
            ):
                raise DataError(
                    f"{path}: two columns are called '{twice}': give one of them another name"
                )
            for value in reader:
                value = {
                    key: None if cell in ("nan", "NaN") else cell for key, cell in value.items()
                }
                fault = (
                    "it has more cells than the header"
                    if None in value
                    else fault_of_encoding(value)
                )
                yield RawRow(str(path), reader.line_num, value, fault)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: broken CSV, {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a parquet file.

    Raises DataError if it cannot be read.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield RawRow(str(path), line, value)
    # A damaged file may raise anything, and so may values that Python has no type for.
    except Exception as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _read_arrow(path: Path) -> Iterator[RawRow]:
    """Yield the rows of an arrow file: a stream, as `save_to_disk` writes it, or a file.

    Raises DataError if it cannot be read.
    """
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
                batches: Iterator[Any] = iter(reader)
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            rows = (value for batch in batches for value in batch.to_pylist())
            yield from (RawRow(str(path), line, value) for line, value in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as arrow: {error}") from error


def _file_hash(path: Path) -> str:
    """Return the hash of a file's content; of a large file that of its size, time and 64 blocks.

    Raises DataError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            status = path.stat()
            digest = blake2b(digest_size=16)
            if status.st_size <= _SMALL_FILE_BYTES:
                digest.update(file.read())
            else:
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
                for index in range(_NUM_SAMPLES):
                    file.seek((status.st_size - 65536) * index // (_NUM_SAMPLES - 1))
                    digest.update(file.read(65536))
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
