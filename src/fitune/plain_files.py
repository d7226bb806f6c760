"""The files of a run, read and written as files that somebody else may have made.

A run directory is copied, unpacked from an archive, or lies where others write. What is read in it may be a FIFO that
never ends a read, a device, or larger than any memory; what is written to may be a symbolic link out of it. Here such a
file is an OSError that says so, which every reader of a run turns into its sentence.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from fitune.units import MIB

MAX_RECORD_BYTES = 64 * MIB
"""Of what is read whole and holds one thing: a summary, a plan, a configuration."""
MAX_LOG_BYTES = 1024 * MIB
"""Of what grows with the steps: two million of them."""
_SAFELY = 0 if sys.platform == "win32" else os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_plain(path: str | os.PathLike[str], flags: int, mode: int = 0o644) -> int:
    """A descriptor, as `os.open` gives it, of a file that is one; also the `opener` of `open`. Raises OSError for a
    symbolic link, a FIFO, a device or a directory."""
    try:
        descriptor = os.open(path, flags | _SAFELY, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, _strange(Path(path)) or error.strerror, os.fspath(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _strange(Path(path)) or "it is no file", os.fspath(path))
    return descriptor


def read_plain(path: Path, *, most_bytes: int = MAX_RECORD_BYTES, follow: bool = False) -> bytes:
    """The content of a file. follow: where it is a symbolic link, that of the file it leads to. Raises OSError, also
    where there are more than `most_bytes`."""
    with open(path.resolve() if follow else path, "rb", opener=open_plain) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most_bytes:,} are read", os.fspath(path))
        return file.read(size)  # no more, since so much memory is taken before it is read


def find_strange(paths: Iterable[Path]) -> str | None:
    """'PATH is a FIFO' of the first of `paths` that is neither missing nor a file or directory of its own."""
    for path in paths:
        if (what := _strange(path)) is not None:
            return f"{path}: {what}"
    return None


def _strange(path: Path) -> str | None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    kinds = (
        (stat.S_ISLNK, "it is a symbolic link"),
        (stat.S_ISFIFO, "it is a FIFO"),
        (stat.S_ISSOCK, "it is a socket"),
        (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "it is a device"),
    )
    return next((f"{what}, not an ordinary file" for is_kind, what in kinds if is_kind(mode)), None)
