"""Reads a run's files while they grow, each time only what was added."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.plain_files import MAX_LOG_BYTES, open_plain, read_plain
from fitune.run.answers import EvalAnswer, read_answers
from fitune.run.directory import RunDirectory, RunRecord, read_run
from fitune.run.memory import MemorySample
from fitune.run.metrics import EvalMetrics, RunEvent, StepMetrics, add_line, as_record

#: of memory.jsonl, about an hour; reading ten hours would take a second
TAIL_BYTES = 2**21


@dataclass(frozen=True, slots=True)
class RunView:
    """What is known about a run at one moment."""

    record: RunRecord
    steps: tuple[StepMetrics, ...]
    evals: tuple[EvalMetrics, ...]
    events: tuple[RunEvent, ...]
    #: the answers to eval.prompts at the last evaluation that has any
    answers: tuple[EvalAnswer, ...]
    #: of the last hour
    samples: tuple[MemorySample, ...]
    #: of work up to the last sign of life, over all sessions
    seconds: float | None
    #: the memory budget of the run's plan
    budget_bytes: int | None
    #: None if the run did not record it
    device_name: str | None


class RunFollower:
    """Reads a run again and again.

    tail_bytes: how much of each file is read at first. By default that is all of it, except for
        memory.jsonl.
    """

    def __init__(self, run: RunDirectory, *, tail_bytes: int | None = None) -> None:
        self._run = run
        self._metrics, self._memory, self._events = (
            _GrowingFile(run.metrics, tail_bytes=tail_bytes),
            _GrowingFile(run.memory, tail_bytes=tail_bytes or TAIL_BYTES),
            _GrowingFile(run.events, tail_bytes=tail_bytes),
        )
        self._forget()

    def read(self) -> RunView:
        """Return the run as it is now. Raises RunDirectoryError if it is gone."""
        record = read_run(self._run.path)
        new = [file.new_lines() for file in (self._metrics, self._memory, self._events)]
        # A file became shorter: the run was started again, or resumed from a checkpoint.
        if any(lines is None for lines in new):
            self._forget()
            new = [file.new_lines() for file in (self._metrics, self._memory, self._events)]
        metrics, memory, events = (lines or [] for lines in new)
        for line in metrics:
            add_line(line, self._steps, self._evals)
        self._samples += [
            sample for line in memory if (sample := as_record(MemorySample, line)) is not None
        ]
        self._run_events += [
            event for line in events if (event := as_record(RunEvent, line)) is not None
        ]
        return RunView(
            record=record,
            steps=tuple(self._steps),
            evals=tuple(self._evals),
            events=tuple(self._run_events),
            answers=_last_answers(self._run.answers),
            samples=tuple(self._samples),
            seconds=self._seconds(record),
            budget_bytes=_read_json(self._run.plan).get("budget_bytes"),
            device_name=self._device_name(),
        )

    def _forget(self) -> None:
        self._steps: list[StepMetrics] = []
        self._evals: list[EvalMetrics] = []
        self._run_events: list[RunEvent] = []
        self._samples: list[MemorySample] = []
        for file in (self._metrics, self._memory, self._events):
            file.rewind()

    def _seconds(self, record: RunRecord) -> float | None:
        """Return the summary's seconds plus the time sampled since it was written."""
        if record.summary is None:
            return None
        written = self._run.summary.stat().st_mtime
        return record.summary.seconds + max(
            0.0, self._samples[-1].time - written if self._samples else 0.0
        )

    def _device_name(self) -> str | None:
        """Return the card's name if the samples have PyTorch's counters, else the processor's."""
        machine = _read_json(self._run.env)
        on_card = bool(self._samples) and self._samples[-1].allocated_bytes is not None
        cards = machine.get("cards") or []
        place = cards[0] if on_card and cards else {} if on_card else machine.get("cpu") or {}
        return place.get("name")


def _last_answers(path: Path) -> tuple[EvalAnswer, ...]:
    try:
        answers = read_answers(path)
    except RunDirectoryError:  # the run is being replaced
        return ()
    return tuple(line for line in answers if line.step == answers[-1].step)


class _GrowingFile:
    """A file of JSON lines that is read from where the previous read ended."""

    def __init__(self, path: Path, *, tail_bytes: int | None = None) -> None:
        self._path, self._tail_bytes = path, tail_bytes
        self._offset = 0

    def rewind(self) -> None:
        self._offset = 0

    def new_lines(self) -> list[Mapping[str, object]] | None:
        """Return the objects in complete lines since the last call; None if the file shrank."""
        try:
            with open(self._path, "rb", opener=open_plain) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    return None
                if self._offset == 0 and self._tail_bytes is not None and size > self._tail_bytes:
                    file.seek(size - self._tail_bytes)
                    file.readline()
                    self._offset = file.tell()
                file.seek(self._offset)
                data = file.read(MAX_LOG_BYTES)
        except OSError:  # not there yet
            return None if self._offset else []
        end = data.rfind(b"\n") + 1
        self._offset += end
        contents = (_parse(line) for line in data[:end].splitlines())
        return [content for content in contents if content is not None]


def _parse(line: bytes) -> Mapping[str, object] | None:
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return _parse(read_plain(path)) or {}
    except OSError:
        return {}
