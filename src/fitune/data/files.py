"""A source of the configuration -> its rows, one at a time, each with the place that it came from.

json (an array, or objects over several lines), jsonl, parquet, csv, tsv and arrow files, text also compressed (gz, zst,
bz2, xz), directories of those (data/splits.py), and hub ids through `datasets`. Nothing is held but the row at hand, so
a file may be larger than memory; only an object that holds the rows in it ({"data": [...]}, or a list for each column)
is held whole. A row that cannot be parsed is yielded with its fault; what makes the whole file unreadable (missing,
empty, binary, a broken array) is a DataError.
"""

import csv
import io
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fitune.boundary import bounded_int, parse_json
from fitune.config import DataConfig, DataSource
from fitune.data.formats import detect_format
from fitune.data.hub import hub_is_known
from fitune.data.keys import TURN_KEYS
from fitune.data.order import shuffled
from fitune.data.splits import COMPRESSIONS, SUFFIXES, TABLES, Split, find_files, suffix_of
from fitune.errors import DataError
from fitune.units import MIB

_WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples", "dataset", "entries")
_MAX_ELEMENT_CHARS = 64 * MIB
_CHUNK = MIB
_SMALL_FILE_BYTES = 64 * MIB
_NUM_SAMPLES = 64
_AFTER_NUMBER = (",", "]", " ", "\t", "\r", "\n")  # anything else, the end of what is held too, may still belong to it


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file. line: counted from 1; the row's number where a format has no lines (parquet,
    hub). fault: why it cannot be parsed, else None."""

    path: str
    line: int
    value: Any
    fault: str | None = None


def read_rows(source: DataSource, *, split: Split = "train") -> Iterator[RawRow]:
    """The rows of a source in their order: of '#n' a sample of n that is the same in every run, then at most max_rows.

    split: what a source is for that has several splits. Raises DataError for what cannot be read at all.
    """
    path, num_sampled = split_sample(source.path)
    rows = _read_all(path, split)
    if num_sampled is not None:
        num_rows = sum(1 for _ in _read_all(path, split))
        chosen = np.zeros(num_rows, bool)
        chosen[shuffled(num_rows, num_rows)[:num_sampled]] = True
        rows = (row for row, keep in zip(rows, chosen, strict=False) if keep)
    return islice(rows, source.max_rows)


def split_sample(path: str) -> tuple[str, int | None]:
    """'sft.jsonl#500' -> ('sft.jsonl', 500). A file whose name really ends so wins."""
    match = re.fullmatch(r"(.+)#(\d+)", path)
    if match is None or Path(path).exists():
        return path, None
    if int(match[2]) == 0:
        raise DataError(f"'{path}' asks for 0 samples: give '#n' with n of at least 1, or leave it out")
    return match[1], int(match[2])


def fingerprint(source: DataSource, *, split: Split = "train") -> list[Any]:
    """What tells whether a source still holds the same rows; goes into the key of the cache.

    A file of up to 64 MiB is hashed whole. Hashing 9 GB would take longer than a start should, so a larger file counts
    as the same when its size, its time of change and 64 blocks spread over it are: the time catches edits in place, the
    blocks another file that was moved there with its old time.
    """
    path, _ = split_sample(source.path)
    if _is_hub_id(path):
        return [source.path, source.max_rows, _load_hub(path, split)._fingerprint]
    return [source.path, source.max_rows, *((str(file), _file_hash(file)) for file in find_files(path, split=split))]


def check_files(data: DataConfig) -> None:
    """Raises DataError where data that is named by a path is not there."""
    for source in data.train_sources:
        _check_path(source.path, "train")
    for source in data.eval_sources or ():
        _check_path(source.path, "eval")


def _check_path(path: str, split: Split) -> None:
    path, _ = split_sample(path)
    if not _is_hub_id(path):
        find_files(path, split=split)


def _read_all(path: str, split: Split) -> Iterator[RawRow]:
    if _is_hub_id(path):
        yield from (RawRow(path, line, row) for line, row in enumerate(_load_hub(path, split), 1))
        return
    for file in find_files(path, split=split):
        num_rows = 0
        for num_rows, row in enumerate(_read_file(file), 1):  # noqa: B007
            yield row
        if num_rows == 0:
            raise DataError(f"{file} is empty: it holds no sample")


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where it is compressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_file(path: Path) -> Iterator[RawRow]:
    suffix = suffix_of(path)
    if suffix in (".parquet", ".arrow") and not _is_pointer(path):
        return _read_parquet(path) if suffix == ".parquet" else _read_arrow(path)
    try:
        with _open(path) as file:
            head = file.read(8192)
            if head.startswith(b"version https://git-lfs"):
                raise DataError(f"{path} is a pointer of Git LFS, not the data itself: fetch that with 'git lfs pull'")
            if head[:4] == b"\xff\xfe\0\0" or head[:4] == b"\0\0\xfe\xff":
                raise DataError(f"{path} is in UTF-32: write it in UTF-8, as 'iconv -f UTF-32 -t UTF-8' does")
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path} is in UTF-16: write it in UTF-8, as 'iconv -f UTF-16 -t UTF-8' does")
            if b"\0" in head:
                raise DataError(f"{path} is no text file (it holds zero bytes): give UTF-8 text or a .parquet file")
            while not head.strip(b"\xef\xbb\xbf \t\r\n") and (more := file.read(8192)):
                head = more
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _read_text(path, suffix, head.lstrip(b"\xef\xbb\xbf \t\r\n"))


def _is_pointer(path: Path) -> bool:
    """Whether Git LFS keeps the file elsewhere."""
    try:
        with path.open("rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except OSError:
        return False


def _read_text(path: Path, suffix: str, head: bytes) -> Iterator[RawRow]:
    """Any failure to unpack a compressed file is said as what it is."""
    try:
        if suffix in TABLES:
            yield from _read_csv(path, "\t" if suffix == ".tsv" else None)
        elif head.startswith(b"[") and not _is_array_a_line(path):
            yield from _read_array(path)
        elif head.startswith(b"{") and (value := _first_object(path)) is not None:
            yield from _read_objects(path, value)
        else:
            yield from _read_lines(path)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _is_array_a_line(path: Path) -> bool:
    """Whether each line is an array of its own, as of messages, and not a part of one."""
    with _open(path) as file:
        lines = [line for line in islice(file, 100) if line.strip(b"\xef\xbb\xbf \t\r\n")][:2]
    if len(lines) < 2 or not lines[1].lstrip().startswith(b"["):
        return False
    try:
        return isinstance(parse_json(lines[0].decode("utf-8-sig")), list)
    except (ValueError, RecursionError):
        return False


def _first_object(path: Path) -> dict[str, Any] | None:
    """The first object of a file, where it stands over several lines, or holds the rows in it; None for JSON lines."""
    with _open(path) as file:
        lines = (line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n"))
        line, is_only = next(lines, b""), next(lines, None) is None
    try:
        text = line.decode("utf-8-sig").strip()
        value = parse_json(text)
        return value if is_only and isinstance(value, dict) and _rows_in(value, path) is not None else None
    except json.JSONDecodeError as error:
        if error.pos < len(text):  # broken in the line: it does not go on in the next
            return None
    except (UnicodeDecodeError, RecursionError, ValueError):
        return None
    try:
        return next((row.value for row in _read_values(path) if isinstance(row.value, dict)), None)
    except (DataError, RecursionError):
        return None  # one line is broken, and the others may be whole


def _read_objects(path: Path, first: Mapping[str, Any]) -> Iterator[RawRow]:
    """Objects one after another, or the rows that the only one holds."""
    rows = _rows_in(first, path)
    if rows is None or sum(1 for _ in islice(_read_values(path), 2)) > 1:
        yield from _read_values(path)
    else:
        yield from (RawRow(str(path), number, row) for number, row in enumerate(rows, 1))


def _rows_in(value: Mapping[str, Any], path: Path) -> list[Any] | None:
    """The rows of an object that is not one itself: {"data": [...]}, a list or a mapping of numbers a column, an object
    for each row, or what pandas writes with orient="split". Raises DataError where it holds those of several splits."""
    columns = list(value.values())
    rows: list[Any] = []
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        if all(isinstance(row, list) and len(row) == len(value["columns"]) for row in value["data"]):
            return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    elif columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        rows = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        rows = [] if any(isinstance(cell, dict) for row in rows[:1] for cell in row.values()) else rows
    elif columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        keys = list(columns[0]) if all(str(key).isdecimal() for key in columns[0]) else []
        rows = [{name: value[name][key] for name in value} for key in keys]
    if rows and detect_format(rows[0]) is not None:
        return rows
    if detect_format(value) is not None:
        return None
    if columns and all(isinstance(row, dict) and detect_format(row) is not None for row in columns):
        return columns
    return _wrapped_rows(value, path)


def _wrapped_rows(value: Mapping[str, Any], path: Path) -> list[Any] | None:
    lists = {
        key: item
        for key, item in value.items()
        if isinstance(item, list) and item and isinstance(item[0], dict) and key not in TURN_KEYS
    }
    holding = [key for key, items in lists.items() if detect_format(items[0]) is not None]
    if len(holding) > 1:
        raise DataError(
            f"{path} holds several lists of samples ({', '.join(holding)}), of which one is for training: "
            "write each into a file of its own"
        )
    if holding:
        return lists[holding[0]]
    wrapper = next((key for key in lists if key in _WRAPPERS), None)
    if wrapper is not None and len(lists) == 1:
        return lists[wrapper]
    inner = value.get("data")
    return _rows_in(inner, path) if isinstance(inner, dict) and len(value) == 1 else None


def _read_lines(path: Path) -> Iterator[RawRow]:
    name = str(path)
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield RawRow(name, number, parse_json(line.decode()))
            except UnicodeDecodeError as error:
                yield RawRow(name, number, None, f"not UTF-8 at byte {error.start + 1}{_encoding_of(line)}")
            except json.JSONDecodeError as error:
                yield RawRow(name, number, None, f"broken JSON at column {error.colno}: {error.msg}")
            except ValueError as error:
                yield RawRow(name, number, None, f"broken JSON: {error}")


_NOT_DECODED = re.compile("[\udc80-\udcff]")
_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def _undecoded(value: Any) -> str | None:
    """Why the texts of a row are none, None where they are."""
    held = [value]
    while held:
        item = held.pop()
        if isinstance(item, str):
            if _NOT_DECODED.search(item):  # bytes that are not UTF-8
                hint = _encoding_of(_OTHER_SURROGATE.sub("", item).encode(errors="surrogateescape"))
                return f"not UTF-8{hint or ': save the file in UTF-8'}"
        elif isinstance(item, dict):
            held += item.values()
        elif isinstance(item, list):
            held += item
    return None


def _encoding_of(line: bytes) -> str:
    """What a line that is not UTF-8 may be in, and how to write it in UTF-8."""
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return ": it may be in GBK, which 'iconv -f GB18030 -t UTF-8' writes in UTF-8"


class _BrokenError(Exception):
    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


_DECODER = json.JSONDecoder(parse_int=bounded_int)


class _Window:
    """A part of a text file that moves on, so that an array of any length is parsed within bounded memory."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.position = 0
        self.line = 1

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def grow(self) -> bool:
        """Reads on, at least doubling what is left, which keeps repeated attempts linear. False at the end."""
        left = self.text[self.position :]
        more = self.file.read(max(_CHUNK, len(left)))
        self.text, self.position = left + more, 0
        return bool(more)

    def value(self) -> tuple[Any, int]:
        """The JSON value at the position, which is not advanced, and where it ends. Raises _BrokenError."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                is_whole = isinstance(value, (dict, list, str)) or self.text[end : end + 1] in _AFTER_NUMBER
                if is_whole or not self.grow():
                    return value, end
            except json.JSONDecodeError as error:
                line = self.line + self.text.count("\n", self.position, error.pos)
                reason = error.msg
                if len(self.text) - self.position > _MAX_ELEMENT_CHARS or not self.grow():
                    raise _BrokenError(reason, line) from None
            except RecursionError:
                raise _BrokenError("nested too deeply", self.line) from None
            except ValueError as error:
                raise _BrokenError(str(error), self.line) from None

    def peek(self) -> str:
        """The next character that is no white space, '' at the end of the file."""
        while True:
            found = re.compile(r"[^ \t\r\n]").search(self.text, self.position)
            self.advance(found.start() if found else len(self.text))
            if found or not self.grow():
                return self.text[self.position : self.position + 1]


def _read_array(path: Path) -> Iterator[RawRow]:
    name = str(path)
    with _open_text(path) as file:
        window = _Window(file)

        def broken(reason: str, line: int) -> DataError:
            return DataError(
                f"{name}, line {line}: broken JSON, {reason}; an array cannot be read past that: mend it, or give the "
                "samples as JSON lines, where single broken samples are counted and skipped"
            )

        window.peek()
        window.advance(window.position + 1)
        after = "["
        while (char := window.peek()) != "]":
            if char == "":
                raise broken("the file ends inside its array", window.line)
            if after == "]":
                if char != ",":
                    raise broken("a comma is missing between two samples", window.line)
                window.advance(window.position + 1)
                window.peek()
            try:
                value, end = window.value()
            except _BrokenError as error:
                raise broken(error.reason, error.line) from None
            yield RawRow(name, window.line, value, _undecoded(value))
            window.advance(end)
            after = "]"
        window.advance(window.position + 1)
        if window.peek():
            raise broken("something follows the end of the array", window.line)


def _read_values(path: Path) -> Iterator[RawRow]:
    """JSON values one after another, over as many lines as they take."""
    name = str(path)
    with _open_text(path) as file:
        window = _Window(file)
        while window.peek():
            try:
                value, end = window.value()
            except _BrokenError as error:
                raise DataError(
                    f"{name}, line {error.line}: broken JSON, {error.reason}; objects over several lines cannot be "
                    "read past that: mend it, or give each sample in a line of its own"
                ) from None
            yield RawRow(name, window.line, value, _undecoded(value))
            window.advance(end)


def _read_csv(path: Path, delimiter: str | None) -> Iterator[RawRow]:
    """delimiter: what stands between cells; None to tell it by the header. Cells of 'nan', which pandas writes where
    there is no value, are none. Raises DataError for a header that names two columns alike."""
    csv.field_size_limit(_MAX_ELEMENT_CHARS)
    with _open_text(path) as file:
        with _open_text(path) as beginning:
            header = beginning.readline(_CHUNK)
        if delimiter is None:
            delimiter = next((mark for mark in ",\t;|" if mark in header), ",")
        has_spaces = f"{delimiter} " in header
        reader = csv.DictReader(file, strict=True, delimiter=delimiter, skipinitialspace=has_spaces)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if name.strip() and names.count(name) > 1), None):
                raise DataError(f"{path}: two columns are called '{twice}': give one of them another name")
            for value in reader:
                value = {key: None if cell in ("nan", "NaN") else cell for key, cell in value.items()}
                fault = "it has more cells than the header" if None in value else _undecoded(value)
                yield RawRow(str(path), reader.line_num, value, fault)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: broken CSV, {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield RawRow(str(path), line, value)
    except Exception as error:  # values that Python has no type for, and whatever a damaged file leads into
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _read_arrow(path: Path) -> Iterator[RawRow]:
    """As `save_to_disk` writes it (a stream), or as pyarrow writes a file."""
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


def _is_hub_id(path: str) -> bool:
    return (
        re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and suffix_of(Path(path)) not in SUFFIXES
        and not Path(path).expanduser().exists()
    )


def _load_hub(path: str, split: Split) -> Any:
    import datasets

    if not hub_is_known():
        datasets.config.HF_HUB_OFFLINE = True  # the cache is used, and nothing is retried for half a minute
    try:
        if split == "train":
            return datasets.load_dataset(path, split="train")
        found = datasets.load_dataset(path)
        name = next((name for name in ("validation", "valid", "dev", "test", "train") if name in found), None)
        if name is None:
            raise DataError(f"the dataset {path} has no split to evaluate with, only {', '.join(found)}")
        return found[name]
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and huggingface_hub raise derives from these
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"no data at {path}: there is no such file or directory, and it cannot be loaded from the hub ({reason})"
        ) from error


def _file_hash(path: Path) -> str:
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
