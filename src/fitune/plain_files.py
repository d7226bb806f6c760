"""Opens the files of a run safely, since somebody else may have made them.

A run directory may be a copy, come from an archive, or be writable by others. A file in it may be a
FIFO on which a read never ends, a device, or larger than the memory; a file to be written may be a
symbolic link to somewhere else. Functions here raise an OSError that says so, which every reader of
a run turns into its own message.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from fitune.units import MIB

#: the largest file with one record: a summary, a plan, a configuration
MAX_RECORD_BYTES = 64 * MIB
#: the largest file that grows with the steps: enough for two million steps
MAX_LOG_BYTES = 1024 * MIB
_SAFELY = 0 if sys.platform == "win32" else os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_plain(path: str | os.PathLike[str], flags: int, mode: int = 0o644) -> int:
    """Open an ordinary file and return its descriptor, like `os.open`; also an `opener` for `open`.

    Raises OSError for a symbolic link, a FIFO, a device or a directory.
    """
    try:
        descriptor = os.open(path, flags | _SAFELY, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(
                error.errno, _strange(Path(path)) or error.strerror, os.fspath(path)
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _strange(Path(path)) or "it is no file", os.fspath(path))
    return descriptor


def read_plain(path: Path, *, most_bytes: int = MAX_RECORD_BYTES, follow: bool = False) -> bytes:
    """Return the content of an ordinary file.

    follow: whether a symbolic link is followed.
    Raises OSError if the file cannot be read, is no ordinary file, or has more than `most_bytes`.
    """
    with open(path.resolve() if follow else path, "rb", opener=open_plain) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(
                errno.EFBIG,
                f"it has {size:,} bytes, and at most {most_bytes:,} are read",
                os.fspath(path),
            )
        # with the size, because a read without it could take more memory than was checked
        return file.read(size)


def find_strange(paths: Iterable[Path]) -> str | None:
    """Return 'PATH: it is a FIFO ...' for the first path that exists but is no file or directory.

    Returns None if there is no such path.
    """
    for path in paths:
        if (what := _strange(path)) is not None:
            return f"{path}: {what}"
    return None


def _strange(path: Path) -> str | None:
    """Return what the path is, if it exists but is no file or directory."""
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
