"""A source of the configuration -> its rows, one at a time, each with the place that it came from.

json (an array, or objects over several lines), jsonl, parquet, csv and arrow files, text also compressed (gz, zst),
directories of those, and hub ids through `datasets`. Nothing is held but the row at hand, so a file may be larger than
memory; only an object that holds the rows in it ({"data": [...]}, or a list for each column) is held whole. A row that
cannot be parsed is yielded with its fault; what makes the whole file unreadable (missing, empty, binary, a broken
array) is a DataError.

The files of a directory are sorted into splits by their names as `datasets` does: those of training are read, and where
a source is to be evaluated with those of validation, else of test.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet

from fitune.boundary import bounded_int, parse_json
from fitune.config import DataConfig, DataSource
from fitune.data.formats import detect_format
from fitune.data.order import shuffled
from fitune.errors import DataError
from fitune.hub import hub_is_known
from fitune.units import MIB

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
Split = Literal["train", "eval"]
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
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
        raise DataError(f"'{path}' asks for a sample of 0 rows: give '#n' with n of at least 1, or leave it out")
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


def find_files(path: str, *, split: Split = "train") -> tuple[Path, ...]:
    """The data files of a path, sorted: the file itself, or those of `split` anywhere below a directory. Raises
    DataError."""
    root = Path(path).expanduser()
    if root.is_dir():
        by_split = _split_files(root)
        if not by_split:
            raise DataError(f"the directory {path} holds no data: no file that ends in {_endings()}")
        wanted = ("train", "") if split == "train" else ("validation", "test", "", "train")
        name = next((name for name in wanted if name in by_split), None)
        if name is None:
            raise DataError(
                f"the directory {path} holds no training data, only files of the split {' and '.join(by_split)}: name "
                f"the file to train on, such as {next(iter(by_split.values()))[0]}"
            )
        return by_split[name]
    if not root.exists():
        raise DataError(f"no data at {path}: there is no such file or directory")
    if _suffix(root) not in SUFFIXES:
        raise DataError(f"{path} has an unknown ending '{root.suffix}': data is read from {_endings()} files")
    return (root,)


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


def other_splits(path: str, *, split: Split = "train") -> dict[str, int]:
    """The splits of a directory that are not read for `split`, with their numbers of files; '' are files of none."""
    root = Path(split_sample(path)[0]).expanduser()
    if not root.is_dir():
        return {}
    read = set(find_files(str(root), split=split))
    return {name: len(files) for name, files in _split_files(root).items() if not read & set(files)}


def _split_files(root: Path) -> dict[str, tuple[Path, ...]]:
    """The data files anywhere below a directory, sorted, by the split that their names tell."""
    by_split: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        is_cache = file.name.startswith("cache-") and file.suffix == ".arrow"  # of datasets' map and filter
        hidden = any(part.startswith(".") for part in relative.parts)
        if _suffix(file) in SUFFIXES and file.name not in _NOT_DATA and file.is_file() and not hidden and not is_cache:
            by_split.setdefault(_split_of(relative), []).append(file)
    return {name: tuple(files) for name, files in by_split.items()}


def _split_of(relative: Path) -> str:
    """'data/train-00000-of-00001.parquet' -> 'train'. The file's own name counts before its directories'."""
    for part in (relative.name.split(".")[0], *reversed(relative.parent.parts)):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for name, keywords in _SPLIT_NAMES.items():
            if any(word in keywords for word in words):
                return name
    return ""


def _suffix(path: Path) -> str:
    """The ending that tells the format, without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _endings() -> str:
    return f"{', '.join(SUFFIXES)} (text also with {', '.join(COMPRESSIONS)})"


def _read_all(path: str, split: Split) -> Iterator[RawRow]:
    if _is_hub_id(path):
        yield from (RawRow(path, line, row) for line, row in enumerate(_load_hub(path, split), 1))
        return
    for file in find_files(path, split=split):
        num_rows = 0
        for num_rows, row in enumerate(_read_file(file), 1):  # noqa: B007
            yield row
        if num_rows == 0:
            raise DataError(f"{file} is empty: it holds no row")


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where it is compressed."""
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix]))


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_file(path: Path) -> Iterator[RawRow]:
    suffix = _suffix(path)
    if suffix in (".parquet", ".arrow"):
        return _read_parquet(path) if suffix == ".parquet" else _read_arrow(path)
    try:
        with _open(path) as file:
            head = file.read(8192)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path} is in UTF-16: write it in UTF-8, as 'iconv -f UTF-16 -t UTF-8' does")
            if b"\0" in head:
                raise DataError(f"{path} is no text file (it holds zero bytes): give UTF-8 text or a .parquet file")
            while not head.strip(b"\xef\xbb\xbf \t\r\n") and (more := file.read(8192)):
                head = more
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return _read_text(path, suffix, head.lstrip(b"\xef\xbb\xbf \t\r\n"))


def _read_text(path: Path, suffix: str, head: bytes) -> Iterator[RawRow]:
    """Any failure to unpack a compressed file is said as what it is."""
    try:
        if suffix == ".csv":
            yield from _read_csv(path)
        elif head.startswith(b"["):
            yield from _read_array(path)
        elif head.startswith(b"{") and (value := _first_object(path)) is not None:
            yield from _read_objects(path, value)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _first_object(path: Path) -> dict[str, Any] | None:
    """The first object of a file, where it stands over several lines, or holds the rows in it; None for JSON lines."""
    with _open(path) as file:
        lines = (line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n"))
        line, is_only = next(lines, b""), next(lines, None) is None
    try:
        text = line.decode("utf-8-sig").strip()
        value = parse_json(text)
        return value if is_only and isinstance(value, dict) and _rows_in(value) is not None else None
    except json.JSONDecodeError as error:
        if error.pos < len(text):  # broken in the line: it does not go on in the next
            return None
    except (UnicodeDecodeError, RecursionError, ValueError):
        return None
    try:
        return next((row.value for row in _read_values(path) if isinstance(row.value, dict)), None)
    except DataError:
        return None  # one line is broken, and the others may be whole


def _read_objects(path: Path, first: Mapping[str, Any]) -> Iterator[RawRow]:
    """Objects one after another, or the rows that the only one holds."""
    rows = _rows_in(first)
    if rows is None or sum(1 for _ in islice(_read_values(path), 2)) > 1:
        yield from _read_values(path)
    else:
        yield from (RawRow(str(path), number, row) for number, row in enumerate(rows, 1))


def _rows_in(value: Mapping[str, Any]) -> list[Any] | None:
    """The rows of an object that is not one itself: {"data": [...]}, or a list or a mapping of numbers a column."""
    columns = list(value.values())
    rows: list[Any] = []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        rows = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        rows = [] if any(isinstance(cell, dict) for row in rows[:1] for cell in row.values()) else rows
    elif columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        keys = list(columns[0]) if all(str(key).isdecimal() for key in columns[0]) else []
        rows = [{name: value[name][key] for name in value} for key in keys]
    if rows and detect_format(rows[0]) is not None:
        return rows
    if detect_format(value) is not None:
        return None
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    for key, items in lists.items():
        if detect_format(items[0]) is not None or (key in _WRAPPERS and len(lists) == 1):
            return items
    return None


def _read_lines(path: Path) -> Iterator[RawRow]:
    name = str(path)
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip(b"\r\n")
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


def _undecoded(value: Mapping[str, Any]) -> str | None:
    """Why the cells of a row are no text, None where they are."""
    for cell in value.values():
        if isinstance(cell, str) and not cell.isascii():
            try:
                cell.encode()
            except UnicodeEncodeError:
                return f"not UTF-8{_encoding_of(cell.encode(errors='surrogateescape'))}"
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
                "rows as JSON lines, where single broken rows are counted and skipped"
            )

        window.peek()
        window.advance(window.position + 1)
        after = "["
        while (char := window.peek()) != "]":
            if char == "":
                raise broken("the file ends inside its array", window.line)
            if after == "]":
                if char != ",":
                    raise broken("a comma is missing between two rows", window.line)
                window.advance(window.position + 1)
                window.peek()
            try:
                value, end = window.value()
            except _BrokenError as error:
                raise broken(error.reason, error.line) from None
            yield RawRow(name, window.line, value)
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
                    "read past that: mend it, or give each row in a line of its own"
                ) from None
            yield RawRow(name, window.line, value)
            window.advance(end)


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(_MAX_ELEMENT_CHARS)
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for value in reader:
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
        and _suffix(Path(path)) not in SUFFIXES
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
