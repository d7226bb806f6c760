"""Finds and reads the runs in a path.

The path may be a run directory, a sweep, a directory of runs, a report of fitune, or the record of
another trainer.
"""

from collections.abc import Iterator
from pathlib import Path

from fitune.boundary import raised_as
from fitune.errors import RunDirectoryError
from fitune.report.embedded import read_report
from fitune.report.other_trainers import find_foreign
from fitune.report.run_on_disk import (
    EVAL_COLUMNS,
    MEMORY_COLUMNS,
    TRAIN_COLUMNS,
    RecordedRun,
    make_curve,
    read_fitune_run,
    read_settings,
)
from fitune.run.directory import RunDirectory
from fitune.run.sweep import SWEEP_FILE, read_states


def read_recorded(path: Path) -> tuple[RecordedRun, ...]:
    """Return the run in `path`, or the runs of a report, a sweep or a directory of runs.

    Raises RunDirectoryError if there is none, or if it cannot be read.
    """
    with raised_as(
        RunDirectoryError, f"{path} cannot be read as a run", "mend it, or leave it out"
    ):
        return _read(path)


def _read(path: Path) -> tuple[RecordedRun, ...]:
    if path.is_file() and path.suffix in (".html", ".htm"):
        return read_report(path)
    if path.is_dir() and RunDirectory(path).checkpoints.is_dir():
        return (read_fitune_run(path),)
    if (path / SWEEP_FILE).is_file():
        return tuple(_sweep(path))
    if path.is_dir():
        inside = sorted(
            entry for entry in path.iterdir() if RunDirectory(entry).checkpoints.is_dir()
        )
        if inside:
            return tuple(read_fitune_run(entry) for entry in inside)
    # last, because a run of fitune may contain TensorBoard's files
    foreign = find_foreign(path)
    if foreign is not None:
        return (foreign,)
    if not path.exists():
        raise RunDirectoryError(
            f"{path} does not exist: give the directory of a run, such as runs/NAME"
        )
    raise RunDirectoryError(
        f"{path} holds no run: give a run directory, a report of fitune, trainer_state.json, trainer_log.jsonl, "
        "ms-swift's logging.jsonl, a TensorBoard directory, a csv of wandb, or a log that minimind or transformers' "
        "Trainer printed"
    )


def _sweep(path: Path) -> Iterator[RecordedRun]:
    """Yield the runs of a sweep in its order.

    A run that does not fit has its plan only; a run that has not begun is left out.
    """
    for name, state in read_states(path).items():
        if RunDirectory(path / name).checkpoints.is_dir():
            yield read_fitune_run(path / name)
        elif state.get("state") == "does not fit":
            notes: list[str] = []
            yield RecordedRun(
                name=name,
                path=str(path / name),
                origin="fitune",
                state="does not fit",
                settings=read_settings(path / "configs" / f"{name}.yaml", notes),
                summary={},
                train=make_curve(TRAIN_COLUMNS, []),
                evals=make_curve(EVAL_COLUMNS, []),
                memory=make_curve(MEMORY_COLUMNS, []),
                plan=state.get("plan"),
                notes=tuple(notes),
            )
