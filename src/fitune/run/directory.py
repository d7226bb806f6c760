"""A run on the disk: one directory with plain files, which can be read while the run goes on.

    config.yaml      the configuration, with the origin of each value
    env.json         the machine
    data.json        the data
    plan.json        what was chosen, and why
    peak.json        what is allocated at the predicted peak
    metrics.jsonl    one line per step and evaluation
    eval_rows.jsonl  one line per evaluation, with the loss of each sample
    answers.jsonl    the answers to eval.prompts at each evaluation
    memory.jsonl     memory over time
    events.jsonl     what happened
    journal.jsonl    what each step did, for resume and replay
    summary.json     the run in numbers
    report.html      the run in charts
    probe.json       what was tried before the run (train.probe)
    checkpoints/     to resume from
    best/ last/      to use: transformers directories
    trackers/        files of the trackers in run.trackers
    lock             locked while a process works on the run; its mtime is the heartbeat

Whole files are written atomically: a reader sees the old or the new one, even after a power cut. A
process that dies in any way loses its lock, which distinguishes a crashed run from a running one.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fitune.errors import RunDirectoryError
from fitune.plain_files import find_strange, open_plain
from fitune.run.files import check_directory, os_errors_reported
from fitune.run.lock import has_heartbeat, heartbeat, is_locked, lock_holder, try_lock
from fitune.run.metrics import Summary, read_summary

State = Literal["running", "finished", "stopped", "failed", "crashed", "damaged"]
#: file systems allow 255, and a number may follow
MAX_NAME_BYTES = 240


class _Inside:
    """A path of RunDirectory: that of the file or directory of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunDirectory", _: type | None = None) -> Path:
        return run.path / self.name


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of a run's files."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    config = _Inside("config.yaml")
    env = _Inside("env.json")
    plan = _Inside("plan.json")
    data = _Inside("data.json")
    reference = _Inside("reference.json")
    peak = _Inside("peak.json")
    metrics = _Inside("metrics.jsonl")
    eval_rows = _Inside("eval_rows.jsonl")
    answers = _Inside("answers.jsonl")
    memory = _Inside("memory.jsonl")
    events = _Inside("events.jsonl")
    journal = _Inside("journal.jsonl")
    summary = _Inside("summary.json")
    probe = _Inside("probe.json")
    #: During a probe: a run directory for each setting that is tried.
    branches = _Inside("probe")
    report = _Inside("report.html")
    checkpoints = _Inside("checkpoints")
    best = _Inside("best")
    last = _Inside("last")
    trackers = _Inside("trackers")
    lock = _Inside("lock")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it is now."""

    run: RunDirectory
    state: State
    #: None before the first one is written
    summary: Summary | None
    #: when it last showed a sign of life, in seconds since 1970
    updated: float
    #: why a damaged run cannot be read
    fault: str | None = None


def check_place(output: Path, name: str, *, overwrite: bool = False) -> None:
    """Raise RunDirectoryError for what `create_run` would refuse, as far as reading can tell."""
    if not name or not name.isprintable() or Path(name).name != name or name in (".", ".."):
        raise RunDirectoryError(
            f"run.name {name!r} is not the name of a directory: use letters, digits, - and _"
        )
    path = output / name
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise RunDirectoryError(
            f"run.name has {len(os.fsencode(name)):,} bytes and may have {MAX_NAME_BYTES}: give a shorter one"
        )
    with os_errors_reported(f"{path} cannot be created"):
        check_directory(output)
        if (
            name.endswith("-")
            or not path.exists()
            or (path.is_dir() and _never_began(RunDirectory(path)))
        ):
            return
        if not path.is_dir() or not _is_run(path):
            raise RunDirectoryError(
                f"{path} exists and is not a run: choose another run.name, or remove it yourself"
            )
        if not overwrite and read_run(path).state in ("stopped", "failed", "crashed"):
            raise RunDirectoryError(
                f"{path} exists and is not finished: --resume {path} goes on with it; else choose "
                "another run.name, or give --overwrite"
            )
        if not overwrite:
            raise RunDirectoryError(f"{path} exists: choose another run.name, or give --overwrite")


def create_run(output: Path, name: str, *, overwrite: bool = False) -> RunDirectory:
    """Create the directory `output/name` with an empty checkpoints/.

    If `name` ends in '-', the next free number is appended, as in `name-0001`; two processes never
    get the same number.

    Raises RunDirectoryError if the directory exists and `overwrite` is not set, if it is not a run
    or a process works on it, or if it cannot be written. `overwrite` removes the files of the run
    and no others.
    """
    check_place(output, name, overwrite=overwrite)
    with os_errors_reported(f"{output / name} cannot be created"):
        output.mkdir(parents=True, exist_ok=True)
        run = (
            _next_number(output, name)
            if name.endswith("-")
            else _given_name(output / name, overwrite=overwrite)
        )
        run.lock.touch()
        run.checkpoints.mkdir(exist_ok=True)
    return run


def name_prefix(model: str, data: str) -> str:
    """Make a name that `create_run` numbers from model and data.

    Example: ('org/MiniMind2', 'data/sft_2048.jsonl#500') -> 'MiniMind2-sft_2048-'.
    """
    names = (Path(source.partition("#")[0]).name for source in (model, data))
    parts = (
        re.sub(r"[^\w.-]+", "_", re.sub(r"\.[a-z][a-z0-9]{1,6}$", "", name)).strip(".")
        for name in names
    )
    return "".join(
        part.encode()[: MAX_NAME_BYTES // 2 - 10].decode(errors="ignore") + "-" for part in parts
    )


BEGIN_ONE = (
    "'fitune train CONFIG' begins one; give the directory where others are kept (run.output)"
)


def open_run(path: Path) -> RunDirectory:
    """Return the existing run at this path. Raises RunDirectoryError if there is none."""
    if not path.is_dir():
        raise RunDirectoryError(
            f"{path} is not a directory: give the directory of a run, such as runs/NAME"
        )
    if not _is_run(path):
        raise RunDirectoryError(
            f"{path} is not the directory of a run: 'fitune runs {path}' lists the runs in it"
        )
    return RunDirectory(path)


def read_run(path: Path) -> RunRecord:
    """Read the state of the run at this path.

    Raises RunDirectoryError if there is no run. If the summary cannot be read, or one of the run's
    files is a link or a device, its state is 'damaged'.
    """
    run = open_run(path)
    times = [
        file.stat().st_mtime
        for file in (run.path, run.lock, run.metrics, run.summary)
        if file.exists()
    ]
    try:
        check_run_files(run)
        summary = read_summary(run.summary) if run.summary.exists() else None
    except RunDirectoryError as error:
        return RunRecord(run, "damaged", None, max(times), str(error))
    return RunRecord(run, _state(run, summary), summary, max(times))


def list_runs(output: Path) -> list[RunRecord]:
    """Return the runs directly below `output`, with the latest sign of life last.

    Raises RunDirectoryError if `output` is not a directory.
    """
    if not output.exists():
        raise RunDirectoryError(
            f"{output} is not a directory, so there are no runs yet: {BEGIN_ONE}"
        )
    if not output.is_dir():
        raise RunDirectoryError(
            f"{output} is not a directory: give the one that runs are kept in (run.output)"
        )
    with os_errors_reported(f"{output} cannot be read"):
        records = [record for path in output.iterdir() if (record := _listed(path)) is not None]
    return sorted(records, key=lambda record: (record.updated, record.run.name))


def _listed(path: Path) -> RunRecord | None:
    """Return the run at this path, or None if there is none.

    A directory that cannot be read is listed as damaged, and as the oldest.
    """
    try:
        return read_run(path) if _is_run(path) else None
    except (OSError, RunDirectoryError) as error:
        reason = getattr(error, "strerror", None) or error
        return RunRecord(
            RunDirectory(path), "damaged", None, 0.0, f"{path} cannot be read: {reason}"
        )


def check_run_files(run: RunDirectory, *, deep: bool = False) -> None:
    """Raise RunDirectoryError if a file of the run is not a regular file or directory.

    A symbolic link leads out of the run, and a FIFO or a device has no end.

    deep: check the directories of weights and checkpoints too.
    """
    names = [*_texts(run), run.lock, *_directories(run)]
    found = find_strange(names)
    if deep and found is None:
        inside = (
            path
            for directory in (run.checkpoints, run.best, run.last)
            for path in directory.rglob("*")
        )
        found = find_strange(inside)
    if found is not None:
        raise RunDirectoryError(f"{found}: put the file itself there, or leave the run alone")


@contextmanager
def working_on(run: RunDirectory) -> Iterator[None]:
    """Hold the run's lock and update its heartbeat.

    Raises RunDirectoryError if another process holds the lock.
    """
    with os_errors_reported(f"{run.lock} cannot be written"):
        descriptor = open_plain(run.lock, os.O_RDWR | os.O_CREAT)
    try:
        locked = try_lock(descriptor)
        if locked is False or has_heartbeat(run.lock, elsewhere=locked is not None):
            raise RunDirectoryError(
                f"{run.path} is being worked on by {lock_holder(run.lock)}: wait for it, or stop it first"
            )
        with heartbeat(run.lock, descriptor):
            yield
    finally:
        os.close(descriptor)


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    return run.checkpoints.is_dir() and (run.lock.is_file() or run.config.is_file())


def _next_number(output: Path, prefix: str) -> RunDirectory:
    taken = [path.name.removeprefix(prefix) for path in output.glob(f"{prefix}*")]
    number = 1 + max((int(end) for end in taken if end.isdecimal()), default=0)
    while True:
        try:
            path = output / f"{prefix}{number:04d}"
            path.mkdir()
            return RunDirectory(path)
        except FileExistsError:
            number += 1


def _given_name(path: Path, *, overwrite: bool) -> RunDirectory:
    run = RunDirectory(path)
    if path.is_dir() and _never_began(run):
        if run.lock.exists():
            with working_on(run):  # raises if another process is about to begin the run
                pass
        return run
    if path.exists():
        with working_on(run):
            _remove_files(run)
    path.mkdir(exist_ok=True)
    return run


def _never_began(run: RunDirectory) -> bool:
    """Return whether the run is empty, because its process died before it wrote anything."""
    names = {path.name for path in run.path.iterdir()} - {run.lock.name, run.checkpoints.name}
    saved = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    return not saved and all(name.startswith(f".{run.config.name}.") for name in names)


def _remove_files(run: RunDirectory) -> None:
    for directory in _directories(run):
        if directory.is_symlink():
            directory.unlink()
        elif directory.is_dir():
            shutil.rmtree(directory)
    for file in _texts(run):
        file.unlink(missing_ok=True)


def _directories(run: RunDirectory) -> tuple[Path, ...]:
    return run.checkpoints, run.best, run.last, run.trackers, run.branches


def _texts(run: RunDirectory) -> tuple[Path, ...]:
    return (
        *(run.config, run.env, run.plan, run.data, run.peak, run.metrics, run.eval_rows),
        *(run.answers, run.memory, run.events, run.journal, run.summary, run.report, run.probe),
        run.reference,
    )


def _state(run: RunDirectory, summary: Summary | None) -> State:
    locked = is_locked(run.lock)
    if locked or has_heartbeat(run.lock, elsewhere=locked is not None):
        return "running"
    return summary.status if summary and summary.status != "running" else "crashed"
