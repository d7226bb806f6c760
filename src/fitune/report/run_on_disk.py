"""Defines a recorded run, of fitune or of another trainer, and reads run directories.

    read_fitune_run(path)   reads a run directory once
    RunReader(path).read()  reads it again and again, each time only what its files gained

`sources.py` finds out what a path is, `embedded.py` reads the runs that a report contains, and
`other_trainers.py` the runs of other trainers. `watch` follows the same files (`run/follow.py`).

A curve is a mapping of columns: float64 arrays of one length, with nan for unknown values. Names
and units are those of `run/metrics.py`, but `seconds` is the time of training since the run began.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fitune.boundary import parse_json
from fitune.config.yaml_lines import parse_yaml
from fitune.errors import ConfigError, RunDirectoryError
from fitune.plain_files import read_plain
from fitune.run.answers import EvalAnswer, read_answers
from fitune.run.directory import open_run, read_run
from fitune.run.eval_rows import EvalRows, read_eval_rows
from fitune.run.growing_file import RunFiles
from fitune.run.memory import MemorySample
from fitune.run.metrics import (
    EvalMetrics,
    RunEvent,
    StepMetrics,
    add_line,
    as_record,
    summary_json,
)
from fitune.run.progress import progress_fraction, seconds_left

Column = npt.NDArray[np.float64]
Curve = Mapping[str, Column]

TRAIN_COLUMNS = (
    "step", "total_tokens", "seconds", "loss", "lr", "grad_norm", "tokens", "tokens_per_second",
    "micro_batch", "num_micro_batches", "peak_allocated_bytes", "peak_reserved_bytes",
    "device_used_bytes", "noise_ratio", "noise_scale_tokens", "margin", "pair_accuracy",
    "kl",
)  # fmt: skip
EVAL_COLUMNS = (
    "step", "total_tokens", "seconds", "eval_loss", "eval_accuracy", "eval_margin",
    "eval_pair_accuracy", "eval_kl",
)  # fmt: skip
MEMORY_COLUMNS = (
    "seconds", "state_bytes", "allocated_bytes", "peak_allocated_bytes", "reserved_bytes",
    "peak_reserved_bytes", "process_bytes", "peak_process_bytes", "program_bytes",
    "device_used_bytes", "device_total_bytes", "other_processes_bytes",
)  # fmt: skip
#: a larger config.yaml is not read, because YAML is parsed at 50,000 bytes per second; a run's own
#: has about 10,000 bytes
_MAX_CONFIG_BYTES = 100_000
#: no quantity of a run is larger
_MOST = 1e30
#: lines become columns in batches, because as records they take ten times the memory
_BATCH_LINES = 5_000
#: of memory, from which the remaining time is estimated: ten minutes
_RECENT_SAMPLES = 1_200
_Signature = tuple[int, int, int]
#: what a file holds
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run as it was recorded."""

    name: str
    path: str
    #: fitune, transformers, llama-factory, ms-swift, wandb, tensorboard, minimind or json
    origin: str
    state: str
    #: dotted key -> value, as far as they are known
    settings: Mapping[str, Any]
    #: the content of summary.json
    summary: Mapping[str, Any]
    train: Curve
    evals: Curve
    memory: Curve
    eval_rows: tuple[EvalRows, ...] = ()
    answers: tuple[EvalAnswer, ...] = ()
    events: tuple[RunEvent, ...] = ()
    #: the content of plan.json, env.json, data.json and peak.json; None if there is no such file
    plan: Mapping[str, Any] | None = None
    env: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    peak: Mapping[str, Any] | None = None
    #: seconds since 1970; None where unknown
    started: float | None = None
    #: of a run that is going on: the share of it that is done (0 to 1), and the remaining time
    progress_fraction: float | None = None
    seconds_left: float | None = None
    #: what could not be read, one message each
    notes: tuple[str, ...] = field(default=())

    @property
    def num_steps(self) -> int:
        return len(self.train["step"])

    @property
    def total_tokens(self) -> float:
        """The tokens up to the last step; nan if the trainer did not count them."""
        return float(self.train["total_tokens"][-1]) if self.num_steps else float("nan")


def make_curve(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> Curve:
    """Return the columns `names` of the rows; a value that is missing or no number becomes nan."""
    curve = {name: np.full(len(rows), np.nan) for name in names}
    for index, row in enumerate(rows):
        for name in names:
            value = row.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                with suppress(OverflowError):
                    curve[name][index] = value
    return curve


def read_fitune_run(path: Path) -> RecordedRun:
    """Read a run directory, also of a run that is going on.

    Raises RunDirectoryError if `path` is no run directory.
    """
    return RunReader(path).read()


class RunReader:
    """Reads a run again and again, each time only what its files gained.

    Raises RunDirectoryError if `path` is no run directory.
    """

    def __init__(self, path: Path) -> None:
        self._run = open_run(path)
        self._files = RunFiles(self._run, tail_bytes=None, memory_tail_bytes=None)
        #: what was read of each file that is written as a whole, with the file's signature
        self._whole: dict[Path, tuple[_Signature, object, list[str]]] = {}
        self._forget()

    def read(self) -> RecordedRun:
        """Return the run as it is now. Raises RunDirectoryError if it cannot be read."""
        record, run = read_run(self._run.path), self._run
        if self._files.rewind_if_shorter():
            self._forget()
        self._read_metrics()
        self._read_memory()
        for line in self._files.events.new_lines():
            if line is not None and (event := as_record(RunEvent, line)) is not None:
                self._events.append(event)
        for path, file in (
            (run.metrics, self._files.metrics),
            (run.memory, self._files.memory),
            (run.events, self._files.events),
        ):
            if file.fault is not None:
                raise RunDirectoryError(f"{path} cannot be read: {file.fault}")
        train = {**self._train, "seconds": np.cumsum(self._train["seconds"])}
        settings = self._once(run.config, read_settings)
        plan = self._once(run.plan, _read_plan)
        env, data, peak = (self._once(path, _read_json) for path in (run.env, run.data, run.peak))
        eval_rows = self._once(run.eval_rows, lambda path, _: read_eval_rows(path))
        answers = self._once(run.answers, lambda path, _: read_answers(path))
        notes = [note for _, _, found in self._whole.values() for note in found]
        if self._num_damaged:
            notes.insert(
                0, f"{self._num_damaged:,} lines of {run.metrics} are damaged and left out"
            )
        last_step = None if self._last is None else self._last.step
        return RecordedRun(
            name=run.name,
            path=str(run.path),
            origin="fitune",
            state=record.state,
            summary={} if record.summary is None else summary_json(record.summary),
            train=train,
            evals=_eval_curve(self._evals, train),
            memory=_memory_curve(self._memory),
            events=tuple(self._events),
            started=float(self._memory["time"].min()) if len(self._memory["time"]) else None,
            progress_fraction=progress_fraction(record, last_step, self._recent),
            seconds_left=seconds_left(record, self._recent),
            notes=tuple(notes + ([record.fault] if record.fault else [])),
            settings=settings or {},
            plan=plan,
            env=env,
            data=data,
            peak=peak,
            eval_rows=eval_rows or (),
            answers=answers or (),
        )

    def _forget(self) -> None:
        self._train = make_curve(TRAIN_COLUMNS, [])
        self._memory = make_curve(("time", *MEMORY_COLUMNS[1:]), [])
        self._last: StepMetrics | None = None
        self._evals: list[EvalMetrics] = []
        self._events: list[RunEvent] = []
        self._recent: deque[MemorySample] = deque(maxlen=_RECENT_SAMPLES)
        self._num_damaged = 0

    def _read_metrics(self) -> None:
        # with the last step before, which tells `add_line` whether steps are done again
        steps = [] if self._last is None else [self._last]
        for line in self._files.metrics.new_lines():
            self._num_damaged += not add_line(line, steps, self._evals)
            if len(steps) > _BATCH_LINES:
                self._keep(steps)
                steps = steps[-1:]
        self._keep(steps)

    def _keep(self, steps: Sequence[StepMetrics]) -> None:
        """Append steps; if the first one was done before, it replaces the later ones."""
        if not steps:
            return
        is_new = steps[0] is not self._last
        place = (
            np.searchsorted(self._train["step"], steps[0].step)
            if is_new
            else len(self._train["step"])
        )
        added = steps if is_new else steps[1:]
        self._train = {
            name: np.concatenate(
                (column[:place], [to_number(getattr(step, name)) for step in added])
            )
            for name, column in self._train.items()
        }
        self._last = steps[-1]

    def _read_memory(self) -> None:
        samples: list[MemorySample] = []
        for line in self._files.memory.new_lines():
            if line is not None and (sample := as_record(MemorySample, line)) is not None:
                samples.append(sample)
            if len(samples) > _BATCH_LINES:
                self._keep_memory(samples)
                samples = []
        self._keep_memory(samples)

    def _keep_memory(self, samples: Sequence[MemorySample]) -> None:
        self._memory = {
            name: np.concatenate((column, [to_number(getattr(each, name)) for each in samples]))
            for name, column in self._memory.items()
        }
        self._recent.extend(samples)

    def _once(self, path: Path, read: Callable[[Path, list[str]], Content]) -> Content | None:
        """Return what `read` returns for a file, read again only if the file has changed."""
        try:
            status = path.lstat()
        except OSError:
            self._whole.pop(path, None)
            return None
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        if path not in self._whole or self._whole[path][0] != signature:
            notes: list[str] = []
            self._whole[path] = (signature, read(path, notes), notes)
        return cast(Content, self._whole[path][1])


def _memory_curve(memory: Curve) -> Curve:
    """Return the samples' columns with the seconds since the first one."""
    times = memory["time"]
    seconds = times - times.min(initial=np.inf) if len(times) else times
    return {"seconds": seconds} | {name: memory[name] for name in MEMORY_COLUMNS[1:]}


def _eval_curve(evals: Sequence[EvalMetrics], train: Curve) -> Curve:
    curve = make_curve(EVAL_COLUMNS, [asdict(each) for each in evals])
    return {**curve, "seconds": seconds_at(train, curve["step"])}


def seconds_at(train: Curve, steps: Column) -> Column:
    """Return the time of training at the end of each of `steps`; 0 before the first."""
    place = np.searchsorted(train["step"], steps, side="right")
    return np.concatenate(([0.0], train["seconds"]))[place]


def _read_json(path: Path, notes: list[str]) -> Mapping[str, object] | None:
    """Return the object of a JSON file; if it cannot be read, add a message to `notes`."""
    if not path.exists():
        return None
    try:
        content = parse_json(read_plain(path))
        if isinstance(content, dict):
            # a ValueError for nan and infinite numbers: JSON has none, and a report contains this
            json.dumps(content, allow_nan=False)
            return content
        notes.append(f"{path} holds no object and is left out")
    except (OSError, ValueError) as error:
        notes.append(f"{path} cannot be read and is left out: {error}")
    return None


def _read_plan(path: Path, notes: list[str]) -> Mapping[str, object] | None:
    """Return the plan of a run, if its numbers are numbers: all readers of a plan rely on that."""
    plan = _read_json(path, notes)
    if plan is None:
        return None
    candidates, chosen = plan.get("candidates") or [], plan.get("chosen")
    is_whole = (
        isinstance(candidates, list)
        and all(isinstance(each, dict) and _has_numbers(each) for each in candidates)
        and (chosen is None or (type(chosen) is int and 0 <= chosen < len(candidates)))
        and _has_numbers(plan)
    )
    if is_whole:
        return plan
    notes.append(f"{path} is damaged and left out: it does not hold a plan")
    return None


def _has_numbers(content: Mapping[str, object]) -> bool:
    return all(
        value is None or (isinstance(value, int | float) and abs(value) < _MOST)
        for name, value in content.items()
        if name.endswith(("_bytes", "_seconds", "_per_step", "_per_second", "_tokens", "_rows"))
    )


def read_settings(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return dotted key -> value of a config.yaml.

    If it cannot be read, a message is added to `notes`.
    """
    if not path.exists():
        return {}
    try:
        content = parse_yaml(
            read_plain(path, most_bytes=_MAX_CONFIG_BYTES).decode(), str(path)
        ).tree
        return dict(flatten(content)) if isinstance(content, dict) else {}
    except (OSError, ValueError, ConfigError, RecursionError, TypeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        notes.append(f"{path} cannot be read and is left out: {' '.join(str(reason).split())}")
        return {}


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of a tree with dotted keys: {'optim': {'lr': 1}} -> ('optim.lr', 1)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_number(value: Any) -> float:
    """Return the value as a float, nan for None."""
    return float("nan") if value is None else float(value)
