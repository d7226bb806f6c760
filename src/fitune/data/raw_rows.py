"""Define a raw row of a data file, and open the file for its bytes or its text.

Compressed files are decompressed while they are read. Bytes that are not UTF-8 survive in the text
as surrogates, so that a fault is reported for the row that contains them, not for the file.
"""

import io
import lzma
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow

from fitune.data.splits import COMPRESSIONS


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file."""

    path: str
    #: from 1; the number of the row where a format has no lines (parquet, hub)
    line: int
    value: Any
    #: why the row cannot be parsed; None where it was parsed
    fault: str | None = None


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for its bytes, decompressed if its suffix names a compression."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(
        open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )


#: what errors="surrogateescape" makes of the bytes that are not UTF-8
_NOT_DECODED = re.compile("[\udc80-\udcff]")
_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def fault_of_encoding(value: object) -> str | None:
    """Return why a string anywhere in a row is not UTF-8; None where all strings are."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if _NOT_DECODED.search(item):
                hint = possible_encoding(
                    _OTHER_SURROGATE.sub("", item).encode(errors="surrogateescape")
                )
                return f"not UTF-8{hint or ': save the file in UTF-8'}"
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return None


def possible_encoding(line: bytes) -> str:
    """Return a hint at the encoding of a line that is not UTF-8, and how to convert it, or ''."""
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return ": it may be in GBK, which 'iconv -f GB18030 -t UTF-8' writes in UTF-8"
