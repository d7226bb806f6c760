"""Write files so that a reader sees the old or the new content, even after a power cut."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import RunDirectoryError

OUTPUT_KEY = "run.output"


def check_directory(directory: Path, *, key: str = OUTPUT_KEY) -> None:
    """Raise RunDirectoryError if no file can be written into this directory, which need not exist yet.

    key: the configuration key that the user can change.
    """
    place = next((place for place in (directory, *directory.parents) if place.exists()), Path("."))
    if not place.is_dir():
        raise RunDirectoryError(
            f"{place} is not a directory, and {key} needs one: give another {key}"
        )
    if not shutil.disk_usage(place).total:  # /proc and similar
        raise RunDirectoryError(
            f"{place} is no place for files: its file system has 0 bytes; change {key}"
        )
    # Root may write into every directory, but not on a disk that is mounted read-only.
    is_read_only = sys.platform != "win32" and os.statvfs(place).f_flag & os.ST_RDONLY
    if is_read_only or not os.access(place, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"{place} cannot be written to by this user: change {key}")


def write_atomically(path: Path, text: str, *, place: str = OUTPUT_KEY) -> None:
    """Write the whole file, or leave the old one after any failure.

    place: the configuration key that the user can change.

    Raises RunDirectoryError (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os_errors_reported(f"{path} cannot be written", place=place):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON with `write_atomically`.

    Raises ValueError for a number that is not finite, which JSON does not have.
    """
    write_atomically(
        path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def sync_directory(path: Path) -> None:
    """Make the renames in a directory survive a power cut.

    Windows has no such call and does not need it.
    """
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def os_errors_reported(what: str, *, place: str = OUTPUT_KEY) -> Iterator[None]:
    """Turn an OSError into a RunDirectoryError that says what failed."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{what}: {error.strerror or error}; give another place with {place}"
        ) from error
