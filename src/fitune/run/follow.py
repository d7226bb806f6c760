"""Reads a run's files while they grow, each time only what was added."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitune.errors import RunDirectoryError
from fitune.plain_files import read_plain
from fitune.run.answers import EvalAnswer, read_answers
from fitune.run.directory import RunDirectory, RunRecord, read_run
from fitune.run.growing_file import RunFiles, parse_object
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
        self._files = RunFiles(
            run, tail_bytes=tail_bytes, memory_tail_bytes=tail_bytes or TAIL_BYTES
        )
        self._forget()

    def read(self) -> RunView:
        """Return the run as it is now. Raises RunDirectoryError if it is gone."""
        record = read_run(self._run.path)
        if self._files.rewind_if_shorter():
            self._forget()
        for line in self._files.metrics.new_lines():
            add_line(line, self._steps, self._evals)
        for line in self._files.memory.new_lines():
            if line is not None and (sample := as_record(MemorySample, line)) is not None:
                self._samples.append(sample)
        for line in self._files.events.new_lines():
            if line is not None and (event := as_record(RunEvent, line)) is not None:
                self._run_events.append(event)
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


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return parse_object(read_plain(path)) or {}
    except OSError:
        return {}
