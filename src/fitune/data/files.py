"""A source of the configuration -> its rows, one at a time, each with the place that it came from.

json (an array), jsonl, parquet and csv files, directories of those, and hub ids through `datasets`. Nothing is held but
the row at hand, so a file may be larger than memory. A row that cannot be parsed is yielded with its fault; what makes
the whole file unreadable (missing, empty, binary, a broken array) is a DataError.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fitune.boundary import bounded_int, parse_json
from fitune.config import DataSource
from fitune.data.order import shuffled
from fitune.errors import DataError
from fitune.hub import hub_is_known
from fitune.units import MIB

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}
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


def read_rows(source: DataSource) -> Iterator[RawRow]:
    """The rows of a source in their order: of '#n' a sample of n that is the same in every run, then at most max_rows.

    Raises DataError for what cannot be read at all.
    """
    path, num_sampled = split_sample(source.path)
    rows = _read_all(path)
    if num_sampled is not None:
        num_rows = sum(1 for _ in _read_all(path))
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


def fingerprint(source: DataSource) -> list[Any]:
    """What tells whether a source still holds the same rows; goes into the key of the cache.

    A file of up to 64 MiB is hashed whole. Hashing 9 GB would take longer than a start should, so a larger file counts
    as the same when its size, its time of change and 64 blocks spread over it are: the time catches edits in place, the
    blocks another file that was moved there with its old time.
    """
    path, _ = split_sample(source.path)
    if _is_hub_id(path):
        return [source.path, source.max_rows, _load_hub(path)._fingerprint]
    return [source.path, source.max_rows, *((str(file), _file_hash(file)) for file in find_files(path))]


def find_files(path: str) -> tuple[Path, ...]:
    """The data files of a path, sorted: the file itself, or those anywhere below a directory. Raises DataError."""
    root = Path(path).expanduser()
    if root.is_dir():
        files = tuple(
            sorted(
                file
                for file in root.rglob("*")
                if file.suffix in SUFFIXES
                and file.name not in _NOT_DATA
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(root).parts)
            )
        )
        if not files:
            raise DataError(f"the directory {path} holds no data: no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not root.exists():
        raise DataError(f"no data at {path}: there is no such file or directory")
    if root.suffix not in SUFFIXES:
        raise DataError(f"{path} has an unknown ending '{root.suffix}': data is read from {', '.join(SUFFIXES)} files")
    return (root,)


def _read_all(path: str) -> Iterator[RawRow]:
    if _is_hub_id(path):
        yield from (RawRow(path, line, row) for line, row in enumerate(_load_hub(path), 1))
        return
    for file in find_files(path):
        num_rows = 0
        for num_rows, row in enumerate(_read_file(file), 1):  # noqa: B007
            yield row
        if num_rows == 0:
            raise DataError(f"{file} is empty: it holds no row")


def _read_file(path: Path) -> Iterator[RawRow]:
    try:
        with path.open("rb") as file:
            head = file.read(8192)
            if path.suffix == ".parquet":
                return _read_parquet(path)
            if b"\0" in head:
                raise DataError(f"{path} is no text file (it holds zero bytes): give UTF-8 text or a .parquet file")
            while not head.strip(b"\xef\xbb\xbf \t\r\n") and (more := file.read(8192)):
                head = more
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".csv":
        return _read_csv(path)
    return _read_array(path) if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[RawRow]:
    name = str(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield RawRow(name, number, parse_json(line.decode()))
            except UnicodeDecodeError as error:
                yield RawRow(name, number, None, f"not UTF-8 at byte {error.start + 1}")
            except json.JSONDecodeError as error:
                yield RawRow(name, number, None, f"broken JSON at column {error.colno}: {error.msg}")
            except ValueError as error:
                yield RawRow(name, number, None, f"broken JSON: {error}")


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

    def peek(self) -> str:
        """The next character that is no white space, '' at the end of the file."""
        while True:
            found = re.compile(r"[^ \t\r\n]").search(self.text, self.position)
            self.advance(found.start() if found else len(self.text))
            if found or not self.grow():
                return self.text[self.position : self.position + 1]


def _read_array(path: Path) -> Iterator[RawRow]:
    name, decoder = str(path), json.JSONDecoder(parse_int=bounded_int)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
            while True:
                try:
                    value, end = decoder.raw_decode(window.text, window.position)
                    is_whole = isinstance(value, (dict, list, str)) or window.text[end : end + 1] in _AFTER_NUMBER
                    if is_whole or not window.grow():
                        break
                except json.JSONDecodeError as error:
                    line = window.line + window.text.count("\n", window.position, error.pos)
                    reason = error.msg
                    if len(window.text) - window.position > _MAX_ELEMENT_CHARS or not window.grow():
                        raise broken(reason, line) from None
                except RecursionError:
                    raise broken("nested too deeply", window.line) from None
                except ValueError as error:
                    raise broken(str(error), window.line) from None
            yield RawRow(name, window.line, value)
            window.advance(end)
            after = "]"
        window.advance(window.position + 1)
        if window.peek():
            raise broken("something follows the end of the array", window.line)


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(_MAX_ELEMENT_CHARS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for value in reader:
                fault = "it has more cells than the header" if None in value else None
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


def _is_hub_id(path: str) -> bool:
    return (
        re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and Path(path).suffix not in SUFFIXES
        and not Path(path).expanduser().exists()
    )


def _load_hub(path: str) -> Any:
    import datasets

    if not hub_is_known():
        datasets.config.HF_HUB_OFFLINE = True  # the cache is used, and nothing is retried for half a minute
    try:
        return datasets.load_dataset(path, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and huggingface_hub raise derives from these
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
