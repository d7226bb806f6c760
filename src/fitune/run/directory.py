"""A run on disk: one directory, plain files, each written by one stage and readable while the run goes on.

    config.yaml     what was asked for, with the origin of each value
    env.json        the machine          plan.json      what was chosen, and why
    data.json       what the data is     peak.json      what is alive at the predicted peak
    eval_rows.jsonl  each evaluation, row by row
    metrics.jsonl   one line a step      memory.jsonl   memory over time
    events.jsonl    what happened        journal.jsonl  what each step did, for resume and replay
    summary.json    the run in numbers   report.html    the run in pictures
    probe.json      what was tried before it (train.probe)
    checkpoints/    to resume from       best/ last/    to use: transformers directories
    trackers/       what the trackers of run.trackers keep here
    lock            held while a process works on the run; its time is the heartbeat

Whole files are written atomically: a reader sees the old one or the new one, also after a power cut. A process that
dies, however it dies, loses its lock, so that a crashed run is told from a running one.
"""

import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.plain_files import find_strange, open_plain, read_plain
from fitune.run.metrics import Summary, read_summary

State = Literal["running", "finished", "stopped", "failed", "crashed", "damaged"]
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
OUTPUT_KEY = "run.output"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def peak(self) -> Path:
        return self.path / "peak.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def eval_rows(self) -> Path:
        return self.path / "eval_rows.jsonl"

    @property
    def memory(self) -> Path:
        return self.path / "memory.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def branches(self) -> Path:
        """While a probe goes on: a run directory for each setting that is tried."""
        return self.path / "probe"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    @property
    def lock(self) -> Path:
        return self.path / "lock"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it stands now. summary: None before the first one is written. updated: the time of its last sign of
    life, in seconds since 1970. fault: why a damaged run cannot be read."""

    run: RunDirectory
    state: State
    summary: Summary | None
    updated: float
    fault: str | None = None


def check_place(output: Path, name: str, *, overwrite: bool = False) -> None:
    """Raises RunDirectoryError for what `create_run` would refuse, as far as that is seen without writing."""
    if not name or not name.isprintable() or Path(name).name != name or name in (".", ".."):
        raise RunDirectoryError(
            f"run.name {name!r} is not the name of a directory: use letters, digits, - and _"
        )
    path = output / name
    with _said(f"{path} cannot be created"):
        for place in (output, *output.parents):
            if place.exists() and not place.is_dir():
                raise RunDirectoryError(
                    f"{place} is a file, and runs are kept in a directory: give another run.output"
                )
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
        if not overwrite:
            raise RunDirectoryError(f"{path} exists: choose another run.name, or give --overwrite")


def create_run(output: Path, name: str, *, overwrite: bool = False) -> RunDirectory:
    """A fresh directory `output/name` with an empty checkpoints/. Where `name` ends in '-', the next free number is
    added, as in `name-0001`; two processes never get the same.

    Raises RunDirectoryError where it exists and not `overwrite`, where it is no run or a run that still works, and
    where it cannot be written. `overwrite` removes the files of a run, and only those.
    """
    check_place(output, name, overwrite=overwrite)
    with _said(f"{output / name} cannot be created"):
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
    """('org/MiniMind2', 'data/sft_2048.jsonl#500') -> 'MiniMind2-sft_2048-', which `create_run` numbers."""
    names = (Path(source.partition("#")[0]).name for source in (model, data))
    return "".join(
        re.sub(r"[^\w.-]+", "_", re.sub(r"\.[a-z][a-z0-9]{1,6}$", "", name)).strip(".") + "-"
        for name in names
    )


BEGIN_ONE = (
    "'fitune train CONFIG' begins one; give the directory where others are kept (run.output)"
)


def open_run(path: Path) -> RunDirectory:
    """An existing run. Raises RunDirectoryError where there is none."""
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
    """Raises RunDirectoryError where there is no run. A summary that cannot be read, or a file that is none of the
    run's own, makes its state 'damaged'."""
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
    """The runs directly below `output`, the one with the latest sign of life last. Raises RunDirectoryError where
    `output` is not a directory."""
    if not output.exists():
        raise RunDirectoryError(
            f"{output} is not a directory, so there are no runs yet: {BEGIN_ONE}"
        )
    if not output.is_dir():
        raise RunDirectoryError(
            f"{output} is not a directory: give the one that runs are kept in (run.output)"
        )
    with _said(f"{output} cannot be read"):
        records = [record for path in output.iterdir() if (record := _listed(path)) is not None]
    return sorted(records, key=lambda record: (record.updated, record.run.name))


def _listed(path: Path) -> RunRecord | None:
    """None where there is no run. What cannot even be looked into is listed as damaged, as the oldest."""
    try:
        return read_run(path) if _is_run(path) else None
    except (OSError, RunDirectoryError) as error:
        reason = getattr(error, "strerror", None) or error
        return RunRecord(
            RunDirectory(path), "damaged", None, 0.0, f"{path} cannot be read: {reason}"
        )


def check_run_files(run: RunDirectory, *, deep: bool = False) -> None:
    """Raises RunDirectoryError where something in the run directory that fitune reads and writes is neither a file nor
    a directory of its own: a symbolic link leads out of the run, a FIFO or a device has no end. deep: also in the
    directories of weights and checkpoints."""
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
    """Hold the run's lock and keep its heartbeat. Raises RunDirectoryError where another process holds it."""
    with _said(f"{run.lock} cannot be written"):
        descriptor = open_plain(run.lock, os.O_RDWR | os.O_CREAT)
    try:
        if (locked := _try_lock(descriptor)) is False or _beats(run, elsewhere=locked is not None):
            raise RunDirectoryError(
                f"{run.path} is being worked on by {_holder(run)}: wait for it, or stop it first"
            )
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        )
        stopped = threading.Event()
        heart = threading.Thread(
            target=_beat, args=(run.lock, stopped), name="heartbeat", daemon=True
        )
        heart.start()
        try:
            yield
        finally:
            stopped.set()
            heart.join()
            with suppress(OSError):
                os.utime(
                    run.lock, (0, 0)
                )  # no heartbeat: other machines need not wait for its silence
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, *, place: str = OUTPUT_KEY) -> None:
    """The whole file or, after any failure, the old one. place: where the user said it is to be. Raises
    RunDirectoryError (no space, no permission)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _said(f"{path} cannot be written", place=place):
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_atomically`. Raises ValueError for a number that is not finite: JSON has none."""
    write_atomically(
        path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def sync_directory(path: Path) -> None:
    """Make the renames in a directory survive a power cut. Windows has no such call and needs none."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _said(what: str, *, place: str = OUTPUT_KEY) -> Iterator[None]:
    """An OSError as one sentence of ours."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{what}: {error.strerror or error}; give another place with {place}"
        ) from error


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
            with working_on(run):  # refused where another process is about to begin it
                pass
        return run
    if path.exists():
        with working_on(run):
            _remove_files(run)
    path.mkdir(exist_ok=True)
    return run


def _never_began(run: RunDirectory) -> bool:
    """Whether it is empty, or its process died before anything was written: there is nothing to lose."""
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
        *(run.memory, run.events, run.journal, run.summary, run.report, run.probe),
    )


def _state(run: RunDirectory, summary: Summary | None) -> State:
    locked = _is_locked(run)
    if locked or _beats(run, elsewhere=locked is not None):
        return "running"
    return summary.status if summary and summary.status != "running" else "crashed"


def _is_locked(run: RunDirectory) -> bool | None:
    """None where the file system has no locks."""
    try:
        descriptor = open_plain(run.lock, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    except OSError:
        return False
    try:
        got = _try_lock(descriptor, attempts=1)
        return None if got is None else not got
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, attempts: int = 5) -> bool | None:
    """Several attempts, since a reader that asks for the state holds the lock for a moment. The system releases a lock
    when its process ends. None where a file system has no locks: there is the heartbeat alone."""
    for attempt in range(attempts):
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if attempt + 1 < attempts:
                time.sleep(0.05)
        except OSError:
            return None
    return False


def _beats(run: RunDirectory, *, elsewhere: bool) -> bool:
    """Whether a process has shown a sign of life of late. elsewhere: only one of another machine counts, whose locks
    may be invisible here."""
    try:
        silence = time.time() - run.lock.stat().st_mtime
        host = parse_json(read_plain(run.lock))["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(host != socket.gethostname() or not elsewhere) and silence < SILENCE_SECONDS


def _holder(run: RunDirectory) -> str:
    try:
        holder = parse_json(read_plain(run.lock))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _beat(lock: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a disk that is away for a while: the next beat may be heard
            os.utime(lock)
