"""The files of checkpoints: where they lie, how they get there as a whole, and whether they are intact.

    checkpoints/step-00000120/
        model/                  a transformers directory (peft's for adapters); last/ and best/ link
                                to its files
        weights.safetensors     trained parameters and buffers by the model's own names; only where
                                the file in model/ stores other tensors
        optimizer.safetensors   the optimizer's tensors, named STATE/PARAMETER
        shards/                 in place of these two, for a sharded model
                                (distributed/checkpoint.py)
        state.json              everything else: counters, position in the data, random numbers,
                                identity, lengths of the logs
        manifest.json           length and hash of each file; written last

A checkpoint is written to a directory with another name, flushed to the disk, and renamed, so it
is there as a whole or not at all. A file that was torn or has rotted nevertheless is found by its
length and hash; the run then goes on from the checkpoint before it.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.model.tensor_file import file_hash
from fitune.plain_files import read_plain
from fitune.run.directory import RunDirectory
from fitune.run.files import sync_directory, write_json
from fitune.training.state import RunState
from fitune.units import MIB, format_bytes

SCHEMA = 1
#: The newest checkpoints that stay on the disk; the one of the best evaluation stays in addition.
NUM_KEPT = 2
#: Free bytes that a save leaves for the logs. Without them the save would end the run that it is
#: to protect.
SPARE_BYTES = 4 * MIB

Json = dict[str, Any]


def checkpoint_path(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def checkpoints_by_step(run: RunDirectory) -> dict[int, Path]:
    paths = (path for path in run.checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
    return {int(path.name.removeprefix("step-")): path for path in paths}


def truncated_logs(run: RunDirectory) -> tuple[Path, ...]:
    """Return the logs that have a line per step or evaluation and so must end with a checkpoint.

    The logs of events and of memory are not among them: they stay true when steps are done again.
    """
    return run.metrics, run.journal, run.eval_rows, run.answers


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise RunDirectoryError if `needed_bytes` and the spare bytes are not free."""
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + SPARE_BYTES > free_bytes:
        raise RunDirectoryError(
            f"{directory} has no space for {format_bytes(needed_bytes)}: {format_bytes(free_bytes)} are free"
        )


def write_manifest(directory: Path, hashes: Mapping[str, str]) -> None:
    """Flush all files of a checkpoint to the disk, and then write their lengths and hashes.

    hashes: those of the files that were hashed and flushed while they were written, by path.
    """
    files: Json = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in hashes:
            flush(path)
        digest = hashes.get(name) or file_hash(path)
        files[name] = {"bytes": path.stat().st_size, "xxh3_128": digest}
    for path in (directory / "model", *(directory / "model").rglob("*")):
        if path.is_dir():
            sync_directory(path)
    write_json(directory / "manifest.json", {"schema": SCHEMA, "files": files})


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises ValueError, OSError, KeyError or TypeError if the checkpoint is damaged.
    """
    manifest = parse_json(read_plain(path / "manifest.json"))
    if manifest["schema"] != SCHEMA:
        raise ValueError(
            f"it has schema {manifest['schema']}, and this fitune reads schema {SCHEMA}"
        )
    for name, expected in manifest["files"].items():
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} of {expected['bytes']:,} bytes")
        if file_hash(path / name) != expected["xxh3_128"]:
            raise ValueError(f"{name} holds other bytes than were written")


def put_in_place(new: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name.

    A step may have been saved before its evaluation already. That checkpoint is removed after the
    new one is in place, or put back if the renaming fails.
    """
    if not final.exists():
        new.rename(final)
        return
    hidden = _hidden(final)
    final.rename(hidden)
    try:
        new.rename(final)
    except OSError:
        hidden.rename(final)
        raise
    shutil.rmtree(hidden)


def remove_old(run: RunDirectory, state: RunState) -> None:
    """Remove all checkpoints but the `NUM_KEPT` newest and the one of the best evaluation."""
    steps = sorted(checkpoints_by_step(run))
    for step in set(steps[:-NUM_KEPT]) - {state.best_step}:
        path = checkpoint_path(run, step)
        # half a directory must never look like a whole checkpoint
        hidden = _hidden(path)
        path.rename(hidden)
        shutil.rmtree(hidden)


def flush(path: Path) -> None:
    """Force a file's content to the disk, if the file exists."""
    if path.exists():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
