"""Read the rows of JSON text: an array, JSON lines, multi-line objects, or one large object."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fitune.boundary import parse_json
from fitune.data.formats import detect_format
from fitune.data.json_window import BrokenJsonError, JsonWindow
from fitune.data.keys import TURN_KEYS
from fitune.data.raw_rows import RawRow, fault_of_encoding, open_bytes, open_text, possible_encoding
from fitune.errors import DataError

#: keys under which a JSON object may contain the list of its rows
_WRAPPERS = (
    "data", "rows", "train", "examples", "instances", "items", "records", "samples", "dataset",
    "entries",
)  # fmt: skip


def read_json(path: Path, head: bytes) -> Iterator[RawRow]:
    """Yield the rows of a file of JSON text in the layout that its first bytes show.

    head: the first bytes of the file without the byte order mark and white space.
    """
    if head.startswith(b"[") and not _is_array_a_line(path):
        yield from _read_array(path)
    elif head.startswith(b"{") and (value := _first_object(path)) is not None:
        yield from _read_objects(path, value)
    else:
        yield from _read_lines(path)


def _is_array_a_line(path: Path) -> bool:
    """Return whether each line is an array of its own (of messages), not part of a larger one."""
    with open_bytes(path) as file:
        lines = [line for line in islice(file, 100) if line.strip(b"\xef\xbb\xbf \t\r\n")][:2]
    if len(lines) < 2 or not lines[1].lstrip().startswith(b"["):
        return False
    try:
        return isinstance(parse_json(lines[0].decode("utf-8-sig")), list)
    except (ValueError, RecursionError):
        return False


def _first_object(path: Path) -> dict[str, object] | None:
    """Return the first object of a file if it spans several lines or contains all the rows.

    Returns None for JSON lines, and where the first line is broken.
    """
    with open_bytes(path) as file:
        lines = (line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n"))
        line, is_only = next(lines, b""), next(lines, None) is None
    try:
        text = line.decode("utf-8-sig").strip()
        value = parse_json(text)
        return (
            value
            if is_only and isinstance(value, dict) and _rows_in(value, path) is not None
            else None
        )
    except json.JSONDecodeError as error:
        # Broken before the end of the line, so the object does not continue in the next line.
        if error.pos < len(text):
            return None
    except (UnicodeDecodeError, RecursionError, ValueError):
        return None
    try:
        return next((row.value for row in _read_values(path) if isinstance(row.value, dict)), None)
    except (DataError, RecursionError):
        # One line is broken, but the others may be valid JSON lines.
        return None


def _read_objects(path: Path, first: Mapping[str, object]) -> Iterator[RawRow]:
    """Yield JSON objects that follow one another, or the rows that the only object contains."""
    rows = _rows_in(first, path)
    if rows is None or sum(1 for _ in islice(_read_values(path), 2)) > 1:
        yield from _read_values(path)
    else:
        yield from (RawRow(str(path), number, row) for number, row in enumerate(rows, 1))


def _rows_in(value: Mapping[str, Any], path: Path) -> list[object] | None:
    """Return the rows that an object contains, or None where the object is itself a row.

    The object may be {"data": [...]}, have a list (or a mapping from row numbers) for each column,
    have an object for each row, or be what pandas writes with orient="split". Raises DataError if
    it contains the rows of several splits.
    """
    columns = list(value.values())
    rows: list[Any] = []
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        if all(
            isinstance(row, list) and len(row) == len(value["columns"]) for row in value["data"]
        ):
            return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    elif columns and all(
        isinstance(column, list) and len(column) == len(columns[0]) for column in columns
    ):
        rows = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        rows = (
            [] if any(isinstance(cell, dict) for row in rows[:1] for cell in row.values()) else rows
        )
    elif columns and all(
        isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns
    ):
        keys = list(columns[0]) if all(str(key).isdecimal() for key in columns[0]) else []
        rows = [{name: value[name][key] for name in value} for key in keys]
    if rows and detect_format(rows[0]) is not None:
        return rows
    if detect_format(value) is not None:
        return None
    if columns and all(isinstance(row, dict) and detect_format(row) is not None for row in columns):
        return columns
    return _wrapped_rows(value, path)


def _wrapped_rows(value: Mapping[str, object], path: Path) -> list[object] | None:
    """Return the rows in the list under one of the object's keys, None where there is no such list.

    Raises DataError if several keys contain a list of rows.
    """
    lists = {
        key: item
        for key, item in value.items()
        if isinstance(item, list) and item and isinstance(item[0], dict) and key not in TURN_KEYS
    }
    holding = [key for key, items in lists.items() if detect_format(items[0]) is not None]
    if len(holding) > 1:
        raise DataError(
            f"{path} holds several lists of samples ({', '.join(holding)}), of which one is for "
            "training: write each into a file of its own"
        )
    if holding:
        return lists[holding[0]]
    wrapper = next((key for key in lists if key in _WRAPPERS), None)
    if wrapper is not None and len(lists) == 1:
        return lists[wrapper]
    inner = value.get("data")
    return _rows_in(inner, path) if isinstance(inner, dict) and len(value) == 1 else None


def _read_lines(path: Path) -> Iterator[RawRow]:
    """Yield the row of each line that is not empty, with a fault where it is not valid JSON."""
    name = str(path)
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield RawRow(name, number, parse_json(line.decode()))
            except UnicodeDecodeError as error:
                yield RawRow(
                    name,
                    number,
                    None,
                    f"not UTF-8 at byte {error.start + 1}{possible_encoding(line)}",
                )
            except json.JSONDecodeError as error:
                yield RawRow(
                    name, number, None, f"broken JSON at column {error.colno}: {error.msg}"
                )
            except ValueError as error:
                yield RawRow(name, number, None, f"broken JSON: {error}")


def _read_array(path: Path) -> Iterator[RawRow]:
    """Yield the elements of the JSON array that makes up the file.

    Raises DataError if the array is broken, incomplete or followed by something else.
    """
    name = str(path)
    with open_text(path) as file:
        window = JsonWindow(file)

        def broken(reason: str, line: int) -> DataError:
            return DataError(
                f"{name}, line {line}: broken JSON, {reason}; an array cannot be read past that: "
                "mend it, or give the "
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
            except BrokenJsonError as error:
                raise broken(error.reason, error.line) from None
            yield RawRow(name, window.line, value, fault_of_encoding(value))
            window.advance(end)
            after = "]"
        window.advance(window.position + 1)
        if window.peek():
            raise broken("something follows the end of the array", window.line)


def _read_values(path: Path) -> Iterator[RawRow]:
    """Yield JSON values that follow one another, each over any number of lines.

    Raises DataError at the first value that is broken.
    """
    name = str(path)
    with open_text(path) as file:
        window = JsonWindow(file)
        while window.peek():
            try:
                value, end = window.value()
            except BrokenJsonError as error:
                raise DataError(
                    f"{name}, line {error.line}: broken JSON, {error.reason}; objects over several "
                    "lines cannot be read past that: mend it, or give each sample in a line of its "
                    "own"
                ) from None
            yield RawRow(name, window.line, value, fault_of_encoding(value))
            window.advance(end)
