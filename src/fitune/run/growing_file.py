"""Reads files of JSON lines while they grow, each time only what was added."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fitune.boundary import parse_json
from fitune.plain_files import MAX_RECORD_BYTES, open_plain
from fitune.run.directory import RunDirectory

#: Lines are read in blocks of this size, so that a long file is never in memory as a whole.
_BLOCK_BYTES = 2**20


class GrowingFile:
    """A file of JSON lines that is read from where the previous read ended.

    tail_bytes: how much of the file is read at first; None for all of it.
    """

    def __init__(self, path: Path, *, tail_bytes: int | None = None) -> None:
        self._path, self._tail_bytes = path, tail_bytes
        #: why the file could not be read, although it is there
        self.fault: str | None = None
        self.rewind()

    def rewind(self) -> None:
        self._offset = 0

    def has_shrunk(self) -> bool:
        """Return whether the file is shorter than what was read of it, or gone."""
        try:
            return self._path.lstat().st_size < self._offset
        except OSError:
            return self._offset > 0

    def new_lines(self) -> Iterator[Mapping[str, object] | None]:
        """Yield the object of each complete line since the last call; None for a damaged line."""
        self.fault = None
        try:
            with open(self._path, "rb", opener=open_plain) as file:
                size = os.fstat(file.fileno()).st_size
                if self._offset == 0 and self._tail_bytes is not None and size > self._tail_bytes:
                    file.seek(size - self._tail_bytes)
                    file.readline()
                    self._offset = file.tell()
                file.seek(self._offset)
                while block := file.read(_BLOCK_BYTES):
                    block += file.readline(MAX_RECORD_BYTES)
                    end = block.rfind(b"\n") + 1
                    if not end and len(block) < MAX_RECORD_BYTES:
                        return  # the last line is still being written
                    # of a line that is longer than any that a run writes, the pieces are damaged
                    self._offset += end or len(block)
                    for line in block[: end or len(block)].removesuffix(b"\n").split(b"\n"):
                        yield parse_object(line)
        except FileNotFoundError:
            return
        except OSError as error:
            self.fault = error.strerror or str(error)


class RunFiles:
    """The growing files of a run, as everything that shows a run reads them.

    tail_bytes, memory_tail_bytes: how much of metrics.jsonl and events.jsonl, and of memory.jsonl,
        is read at first; None for all of it.
    """

    def __init__(
        self, run: RunDirectory, *, tail_bytes: int | None, memory_tail_bytes: int | None
    ) -> None:
        self.metrics = GrowingFile(run.metrics, tail_bytes=tail_bytes)
        self.events = GrowingFile(run.events, tail_bytes=tail_bytes)
        self.memory = GrowingFile(run.memory, tail_bytes=memory_tail_bytes)

    def rewind_if_shorter(self) -> bool:
        """Begin all files again if one became shorter, and return whether that was so.

        It becomes so when the run was started again, or resumed from a checkpoint.
        """
        files = (self.metrics, self.events, self.memory)
        if not any(file.has_shrunk() for file in files):
            return False
        for file in files:
            file.rewind()
        return True


def parse_object(line: bytes) -> Mapping[str, object] | None:
    """Return the JSON object of a line, or None if it holds none."""
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
