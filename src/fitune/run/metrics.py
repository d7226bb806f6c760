"""Reads and writes what a run measured: one JSON object per line during the run, and one summary.

A line is one write, handed to the system at once. It survives the death of the process but not that
of the machine (there is no fsync; a checkpoint has its own). Readers skip an incomplete last line.
A number that is not finite is written as "nan", "inf" or "-inf", because JSON has no such numbers
and a diverged loss must stay visible. Unknown values are null.
"""

import errno
import html
import json
import math
import os
import threading
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_type_hints

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.language import say
from fitune.plain_files import MAX_LOG_BYTES, open_plain, read_plain
from fitune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1
#: Truncating a half-written line must not truncate another thread's line.
_WRITING = threading.Lock()
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Tokens, seconds and peaks are of this step alone."""

    step: int
    tokens: int
    supervised_tokens: int
    #: of the run up to this step
    total_tokens: int
    #: mean over the supervised tokens of the step
    loss: float
    #: the rate of the step
    lr: float
    #: before clipping
    grad_norm: float
    seconds: float
    tokens_per_second: float
    num_micro_batches: int
    #: samples of the largest micro-batch
    micro_batch: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    #: Averages over the last steps; None if they cannot be measured. signal is U, variance is T (in
    #: tokens), ratio is rho, scale is B_noise, and bounce is tau (batch_size/noise.py). For
    #: `preconditioned`, squares are weighted as Adam weighs them.
    noise_signal: float | None = None
    noise_variance: float | None = None
    noise_ratio: float | None = None
    noise_scale_tokens: float | None = None
    noise_scale_preconditioned_tokens: float | None = None
    noise_bounce: float | None = None
    #: Means over the pairs of a step of preferences: the rewards of the chosen and of the rejected
    #: answer, their difference, and how often the chosen one has the larger reward.
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    margin: float | None = None
    pair_accuracy: float | None = None
    #: of kto: the estimate of KL(model, reference) that the step compared with; the two rewards are
    #: then means over the desirable answers and over the others
    kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalMetrics:
    """One evaluation, after `step` steps."""

    step: int
    total_tokens: int
    #: mean over all supervised tokens of the held-out samples, or over their pairs
    eval_loss: float
    eval_tokens: int
    seconds: float
    #: the exponential of the loss; None for preferences, as the next one
    eval_perplexity: float | None = None
    #: the fraction of the supervised tokens that the model predicts as most likely
    eval_accuracy: float | None = None
    peak_allocated_bytes: int | None = None
    #: of preferences, as in `StepMetrics`
    eval_chosen_reward: float | None = None
    eval_rejected_reward: float | None = None
    eval_margin: float | None = None
    eval_pair_accuracy: float | None = None
    eval_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """Something that is worth a line in the run's log."""

    #: seconds since 1970
    time: float
    step: int
    #: in lower case with underscores, such as out_of_memory, retry, micro_batch, resume
    kind: str
    #: for the user
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The run in numbers; unknown values are None.

    predicted_*_bytes and measured_*_bytes are of the second optimizer step; the measured ones are
    None until it is done. peak_*_bytes are the largest measured in the whole run, with evaluations.
    On a CPU "reserved" is what is resident above the state before the model was loaded, and
    "device" is all that is resident.
    """

    schema: int = SCHEMA
    status: Status = "running"
    steps: int = 0
    #: how many the run will have; None if its length is in tokens or its batch grows
    total_steps: int | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    #: of training, evaluation and saving, over all sessions
    seconds: float = 0.0
    #: over all these seconds
    tokens_per_second: float | None = None
    #: of the last step
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    measured_device_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    num_ooms: int = 0
    num_retries: int = 0
    micro_batch_changes: int = 0
    effective_batch: int | None = None
    config_hash: str | None = None
    data_hash: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The run's peak in one number: reserved memory, or the device's if that is unknown."""
        return self.peak_reserved_bytes or self.peak_device_bytes

    def __repr__(self) -> str:
        """Return the summary in one line."""
        loss = "n/a" if self.eval_loss is None else f"{self.eval_loss:.4f}"
        return say(
            "Summary: {status} after {steps} steps, {tokens} tokens, {time} | eval loss {loss} | peak memory {peak}",
            status=say(self.status),
            steps=f"{self.steps:,}",
            tokens=format_count(self.tokens),
            time=format_seconds(self.seconds),
            loss=loss,
            peak=format_bytes(self.peak_bytes),
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"


@dataclass(frozen=True, slots=True)
class Metrics:
    """The content of a metrics file."""

    steps: tuple[StepMetrics, ...]
    evals: tuple[EvalMetrics, ...]
    #: the numbers, from 1, of complete lines that could not be read
    damaged_lines: tuple[int, ...] = ()


Record = TypeVar("Record", bound="DataclassInstance")


def append_line(
    path: Path, record: "DataclassInstance", *, leave_out_unknown: bool = False
) -> None:
    """Append a record to a file of JSON lines.

    leave_out_unknown: leave out fields that are None.

    Raises RunDirectoryError if the line cannot be written as a whole.
    """
    try:
        write_line(path, as_line(record, leave_out_unknown=leave_out_unknown))
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror}") from error


def as_line(record: "DataclassInstance", *, leave_out_unknown: bool = False) -> bytes:
    content = {
        name: value
        for name, value in as_json(record).items()
        if value is not None or not leave_out_unknown
    }
    return f"{json.dumps(content, ensure_ascii=False, allow_nan=False)}\n".encode()


def write_line(path: Path, line: bytes) -> None:
    """Append a line as a whole, or leave the file as it was. Raises OSError."""
    with _WRITING, open(path, "ab+", buffering=0, opener=open_plain) as file:
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(-1, os.SEEK_END)
            # End a line that a killed process left incomplete, so that only this line is damaged.
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file. Raises RunDirectoryError if it cannot be opened.

    A run that was resumed from an earlier step did later steps again; the last line of a step
    counts.
    """
    steps: list[StepMetrics] = []
    evals: list[EvalMetrics] = []
    damaged = [
        number for number, content in read_lines(path) if not add_line(content, steps, evals)
    ]
    return Metrics(tuple(steps), tuple(evals), tuple(damaged))


def add_line(
    content: Mapping[str, object] | None, steps: list[StepMetrics], evals: list[EvalMetrics]
) -> bool:
    """Add a line of metrics to those before it, and return whether it could be read."""
    record = None
    if content is not None:
        record = (
            as_record(EvalMetrics, content)
            if "eval_loss" in content
            else as_record(StepMetrics, content)
        )
    if isinstance(record, EvalMetrics):
        evals.append(record)
    elif record is not None:
        if steps and record.step <= steps[-1].step:
            steps[:] = [earlier for earlier in steps if earlier.step < record.step]
            evals[:] = [earlier for earlier in evals if earlier.step < record.step]
        steps.append(record)
    return record is not None


def read_events(path: Path) -> tuple[RunEvent, ...]:
    """Read the events in the order written, without damaged lines.

    Raises RunDirectoryError if the file cannot be opened.
    """
    return tuple(read_records(path, RunEvent))


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the lines of a file that hold a `kind`, in the order written.

    Raises RunDirectoryError if the file cannot be opened.
    """
    for _, content in read_lines(path):
        if content is not None and (record := as_record(kind, content)) is not None:
            yield record


def summary_json(summary: Summary) -> dict[str, object]:
    """Convert the summary for `write_json`."""
    return as_json(summary)


def as_json(record: "DataclassInstance") -> dict[str, object]:
    """Convert a record to JSON values, with numbers that are not finite as text."""
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(record).items()
    }


def read_summary(path: Path) -> Summary:
    """Read a summary. Raises RunDirectoryError if it is missing, damaged or of another version."""
    try:
        content = parse_json(read_plain(path))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise RunDirectoryError(f"{path} has schema {version}; this fitune reads schema {SCHEMA}")
    summary = as_record(Summary, content)
    if summary is None or summary.status not in get_args(Status):
        raise RunDirectoryError(f"{path} is damaged: it does not hold a run's summary")
    return summary


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object] | None]]:
    """Yield each complete line's number, from 1, and its object; None if the line is damaged.

    Raises RunDirectoryError if the file cannot be read.
    """
    try:
        data = read_plain(path, most_bytes=MAX_LOG_BYTES)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            content = parse_json(line)
        except ValueError:
            content = None
        yield number, content if isinstance(content, dict) else None


def as_record(kind: type[Record], content: Mapping[str, object]) -> Record | None:
    """Build a record from a line, without fields that only a later version knows.

    Returns None if a field is missing or has the wrong type.
    """
    known = {}
    try:
        for name, accepted in _fields(kind).items():
            if name in content:
                value = content[name]
                known[name] = value if type(value) in accepted else _value(accepted, value)
        return kind(**known)
    except (TypeError, ValueError, OverflowError):
        return None


@cache
def _fields(kind: type["DataclassInstance"]) -> dict[str, tuple[object, ...]]:
    """Return the types that each field accepts."""
    wanted = get_type_hints(kind)
    return {
        field.name: get_args(hint)
        if isinstance(hint := wanted[field.name], types.UnionType)
        else (hint,)
        for field in fields(kind)
    }


def _value(accepted: tuple[object, ...], value: object) -> object:
    """Convert a value whose type differs from the field's, or raise ValueError.

    Allowed are a whole number or a text like "nan" for a float, and a text for a literal.
    """
    if float in accepted and (value in ("nan", "inf", "-inf") or type(value) is int):
        return float(value)
    if isinstance(value, str) and int not in accepted:
        return value
    raise ValueError(f"{value!r} is not one of {accepted}")
