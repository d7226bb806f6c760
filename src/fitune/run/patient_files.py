"""Writes a run's logs and summary, even if the disk is full or unavailable for a while.

What cannot be written waits in memory, in order, and is written with the next line. Other faults
(no permission, a missing directory) are raised at once, because waiting does not help.
"""

import errno
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fitune.errors import RunDirectoryError
from fitune.run.files import write_json
from fitune.run.metrics import as_line, write_line
from fitune.units import MIB, format_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: some hundred thousand steps
MOST_WAITING_BYTES = 64 * MIB
TRY_SECONDS = 0.5
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "EAGAIN",
        "EBUSY",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
    )
    if hasattr(errno, name)
)


class PatientFiles:
    """Writes lines and whole files, and may be called from several threads.

    most_bytes: how much may wait in memory.
    drops_oldest: beyond that, drop the oldest lines instead of raising RunDirectoryError.
    """

    def __init__(self, *, most_bytes: int = MOST_WAITING_BYTES, drops_oldest: bool = False) -> None:
        self._most_bytes, self._drops_oldest = most_bytes, drops_oldest
        self._lines: dict[Path, deque[bytes]] = {}
        self._whole: dict[Path, Mapping[str, object]] = {}
        self._lock = threading.Lock()
        self._fault: str | None = None
        self._news: deque[str] = deque()

    def append(
        self, path: Path, record: "DataclassInstance", *, leave_out_unknown: bool = False
    ) -> None:
        """Append a line to a log, now or as soon as there is space.

        Raises RunDirectoryError if waiting does not help.
        """
        with self._lock:
            self._lines.setdefault(path, deque()).append(
                as_line(record, leave_out_unknown=leave_out_unknown)
            )
            self._try()
            self._bound()

    def replace(self, path: Path, content: Mapping[str, object]) -> None:
        """Write a JSON file, now or as soon as there is space.

        Of several versions that wait, only the last is written.
        """
        with self._lock:
            self._whole[path] = content
            self._try()

    def size(self, path: Path) -> int:
        """Return the size of a log, with the lines that wait."""
        with self._lock:
            written = path.stat().st_size if path.exists() else 0
            return written + sum(map(len, self._lines.get(path, ())))

    def flush(self) -> None:
        """Write what waits. Raises RunDirectoryError if something still waits."""
        with self._lock:
            self._try()
            if self._fault is not None:
                raise RunDirectoryError(self._fault)

    def close(self, *, patience: float) -> str | None:
        """Try for `patience` seconds to write what waits; return a message if something is lost."""
        until = time.monotonic() + patience
        while True:
            try:
                self.flush()
                return None
            except RunDirectoryError as error:
                if time.monotonic() >= until:
                    return f"{error}: what waited to be written is lost"
            time.sleep(TRY_SECONDS)

    def take_news(self) -> list[str]:
        """Return messages since the last call: that writing fails, and that it works again."""
        with self._lock:
            news = list(self._news)
            self._news.clear()
            return news

    def _try(self) -> None:
        fault = None
        for path, lines in self._lines.items():
            try:
                while lines:
                    write_line(path, lines[0])
                    lines.popleft()
            except OSError as error:
                fault = self._passing(error, path)
        for path in list(self._whole):
            try:
                write_json(path, self._whole[path])
                del self._whole[path]
            except RunDirectoryError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                fault = self._passing(error.__cause__, path)
        if fault is not None and self._fault is None:
            self._news.append(
                f"warning: {fault}: what the run writes waits in memory until it can be written; make room"
            )
        elif fault is None and self._fault is not None:
            self._news.append("what waited in memory is written")
        self._fault = fault

    def _passing(self, error: OSError, path: Path) -> str:
        message = f"{path} cannot be written: {error.strerror or error}"
        if error.errno not in _PASSING:
            self._lines.pop(path, None)
            self._whole.pop(path, None)
            raise RunDirectoryError(message) from error
        return message

    def _bound(self) -> None:
        while sum(len(line) for lines in self._lines.values() for line in lines) > self._most_bytes:
            if not self._drops_oldest:
                raise RunDirectoryError(
                    f"{self._fault}, and {format_bytes(self._most_bytes)} wait to be written"
                )
            max(self._lines.values(), key=len).popleft()
