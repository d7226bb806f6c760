"""Finds the runs that the page may see: those directly below one directory."""

import os
from pathlib import Path

from fitune.errors import RunDirectoryError
from fitune.run.directory import RunDirectory, open_run


def run_in(directory: Path, name: str) -> RunDirectory:
    """Return the run of this name in `directory`.

    Raises RunDirectoryError if there is none, or if the name leads out of the directory.
    """
    path = directory / name
    names = os.listdir(directory) if directory.is_dir() else []
    if name not in names or path.is_symlink():
        raise RunDirectoryError(f"{name!r} is not the name of a run in {directory}")
    return open_run(path)
