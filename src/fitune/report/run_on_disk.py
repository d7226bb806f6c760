"""Defines a recorded run, of fitune or of another trainer, and reads it.

    read_fitune_run(path)   reads a run directory
    read_report(path)       reads the runs that a report.html contains

`sources.py` finds out what a path is, and `other_trainers.py` reads the runs of other trainers.

A curve is a mapping of columns: float64 arrays of one length, with nan for unknown values. Names
and units are those of `run/metrics.py`, but `seconds` is the time of training since the run began.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fitune.boundary import parse_json
from fitune.config.yaml_lines import parse_yaml
from fitune.errors import ConfigError, RunDirectoryError
from fitune.plain_files import MAX_LOG_BYTES, read_plain
from fitune.report.thin import thin_all
from fitune.run.answers import EvalAnswer, read_answers
from fitune.run.directory import read_run
from fitune.run.eval_rows import EvalRows, read_eval_rows
from fitune.run.metrics import (
    EvalMetrics,
    RunEvent,
    StepMetrics,
    read_events,
    read_metrics,
    summary_json,
)

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
    "peak_reserved_bytes", "process_bytes", "peak_process_bytes", "device_used_bytes",
    "peak_device_used_bytes", "device_total_bytes", "other_processes_bytes",
)  # fmt: skip
#: a larger config.yaml is not read, because YAML is parsed at 50,000 bytes per second; a run's own
#: has about 10,000 bytes
_MAX_CONFIG_BYTES = 100_000
#: no quantity of a run is larger
_MOST = 1e30
#: the id of the HTML element of a report that contains its runs as JSON
EMBEDDED_ID = "fitune-runs"
#: the most events of a run that a report contains
MAX_EVENTS = 200
#: the most answers of a run that a report contains
MAX_ANSWERS = 200
#: the most characters of a text that a report contains
MAX_CHARS = 300


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
    record = read_run(path)
    run, notes = record.run, []
    metrics = read_metrics(run.metrics) if run.metrics.exists() else None
    if metrics and metrics.damaged_lines:
        notes.append(
            f"{len(metrics.damaged_lines):,} lines of {run.metrics} are damaged and left out"
        )
    steps = metrics.steps if metrics else ()
    train = _step_curve(steps)
    env, data, peak = (_read_json(file, notes) for file in (run.env, run.data, run.peak))
    plan = _read_plan(run.plan, notes)
    memory, started = _memory_curve(run.memory)
    return RecordedRun(
        name=run.name,
        path=str(path),
        origin="fitune",
        state=record.state,
        settings=read_settings(run.config, notes),
        summary={} if record.summary is None else summary_json(record.summary),
        train=train,
        evals=_eval_curve(metrics.evals if metrics else (), train),
        memory=memory,
        eval_rows=read_eval_rows(run.eval_rows) if run.eval_rows.exists() else (),
        answers=read_answers(run.answers),
        events=read_events(run.events) if run.events.exists() else (),
        plan=plan,
        env=env,
        data=data,
        peak=peak,
        started=started,
        notes=tuple(notes + ([record.fault] if record.fault else [])),
    )


def _step_curve(steps: Sequence[StepMetrics]) -> Curve:
    def column(name: str) -> Column:
        return np.array([_number(getattr(step, name)) for step in steps], dtype=np.float64)

    curve = {name: column(name) for name in TRAIN_COLUMNS}
    return curve | {"seconds": np.cumsum(curve["seconds"])}


def _eval_curve(evals: Sequence[EvalMetrics], train: Curve) -> Curve:
    curve = make_curve(EVAL_COLUMNS, [asdict(each) for each in evals])
    return {**curve, "seconds": seconds_at(train, curve["step"])}


def seconds_at(train: Curve, steps: Column) -> Column:
    """Return the time of training at the end of each of `steps`; 0 before the first."""
    place = np.searchsorted(train["step"], steps, side="right")
    return np.concatenate(([0.0], train["seconds"]))[place]


def _memory_curve(path: Path) -> tuple[Curve, float | None]:
    """Return the curve of memory.jsonl, and the time of its first line."""
    rows = list(_json_lines(path))
    times = [float(row["time"]) for row in rows if isinstance(row.get("time"), int | float)]
    start = min(times, default=None)
    rows = [
        row | {"seconds": row["time"] - start}
        for row in rows
        if isinstance(row.get("time"), int | float)
    ]
    return make_curve(MEMORY_COLUMNS, rows), start


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; damaged lines are skipped."""
    if not path.exists():
        return
    try:
        lines = read_plain(path, most_bytes=MAX_LOG_BYTES).split(b"\n")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


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


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def embed(run: RecordedRun, *, max_points: int) -> dict[str, object]:
    """Return the run as JSON, for a report that can be compared again.

    It contains curves of at most `max_points`, the samples' losses of the last evaluation, and the
    last events.
    """

    def columns(curve: Curve, *watched: str) -> dict[str, list[float | None]]:
        """Return fewer points of the curve, with the extremes of the `watched` columns."""
        known = [curve[name] for name in watched if np.isfinite(curve[name]).any()]
        rows = thin_all(known or [curve[watched[0]]], max_points)
        thinned = {
            name: column[rows] for name, column in curve.items() if np.isfinite(column).any()
        }
        return {name: [_short(value) for value in column] for name, column in thinned.items()}

    plain = ("name", "path", "origin", "state", "summary", "started")
    return {
        **{name: getattr(run, name) for name in plain},
        "settings": {key: clip(value) for key, value in run.settings.items()},
        "train": columns(run.train, "loss", "peak_reserved_bytes", "device_used_bytes"),
        "evals": columns(run.evals, "eval_loss"),
        "memory": columns(run.memory, "peak_reserved_bytes", "peak_process_bytes"),
        "eval_rows": [
            asdict(rows) | {"losses": [round(loss, 4) for loss in rows.losses]}
            for rows in run.eval_rows[-1:]
        ],
        "answers": [
            asdict(line) | {"prompt": clip(line.prompt), "answer": clip(line.answer)}
            for line in run.answers[-MAX_ANSWERS:]
        ],
        "events": [
            asdict(event) | {"message": clip(event.message)} for event in run.events[-MAX_EVENTS:]
        ],
        "plan": run.plan,
        "env": run.env,
        "data": run.data,
        "peak": run.peak,
        "notes": list(run.notes),
    }


def clip(value: object) -> Any:
    """Cut a text to MAX_CHARS characters.

    Numbers, booleans and None are returned unchanged; any other value is returned as cut text.
    """
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"


def _short(value: float) -> float | None:
    """Return the value with seven digits, or None for nan and infinity, which JSON lacks."""
    return float(f"{value:.7g}") if np.isfinite(value) else None


def read_report(path: Path) -> tuple[RecordedRun, ...]:
    """Return the runs that a report of fitune contains.

    Raises RunDirectoryError if there are none.
    """
    finder = _Embedded()
    try:
        finder.feed(read_plain(path, follow=True).decode())
        content = parse_json("".join(finder.parts))
        return tuple(_unembed(each) for each in content["runs"])
    # any exception, because anybody may have written the file
    except Exception as error:
        raise RunDirectoryError(
            f"{path} holds no runs: it is no report of fitune, or a damaged one"
        ) from error


def _unembed(content: Mapping[str, Any]) -> RecordedRun:
    """Return the run that `embed` returned as JSON."""

    def curve(names: Sequence[str], columns: Mapping[str, Sequence[float | None]]) -> Curve:
        length = max(map(len, columns.values()), default=0)
        return {
            name: np.array([_number(value) for value in columns[name]])
            if name in columns
            else np.full(length, np.nan)
            for name in names
        }

    plain = ("name", "path", "origin", "state", "summary", "settings", "started")
    return RecordedRun(
        **{name: content[name] for name in plain},
        **{name: content[name] for name in ("plan", "env", "data", "peak")},
        train=curve(TRAIN_COLUMNS, content["train"]),
        evals=curve(EVAL_COLUMNS, content["evals"]),
        memory=curve(MEMORY_COLUMNS, content["memory"]),
        eval_rows=tuple(
            EvalRows(
                step=int(rows["step"]),
                total_tokens=int(rows["total_tokens"]),
                losses=tuple(rows["losses"]),
                weights=tuple(rows["weights"]),
            )
            for rows in content["eval_rows"]
        ),
        # reports of earlier versions have none
        answers=tuple(EvalAnswer(**line) for line in content.get("answers", ())),
        events=tuple(RunEvent(**event) for event in content["events"]),
        notes=tuple(content["notes"]),
    )


class _Embedded(HTMLParser):
    """Collects the text of the element EMBEDDED_ID."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script" and dict(attrs).get("id") == EMBEDDED_ID

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.parts.append(data)
