"""What a run measured: one JSON object a line while it goes on, one summary at its end.

A line is one write, handed to the system at once: it survives the death of the process, not that of the machine (no
fsync: a checkpoint has its own). Readers skip a last line that is not complete yet. A number that is not finite is
written as "nan", "inf" or "-inf", since JSON has none and a diverged loss must stay visible; unknown is null.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.language import say
from fitune.plain_files import MAX_LOG_BYTES, open_plain, read_plain
from fitune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1
_WRITING = threading.Lock()
"""Taking back half a line must not take another thread's."""
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Tokens, seconds and peaks are of this step alone; total_tokens of the run up to it.

    loss: mean over the supervised tokens of the step. lr: the rate that the step was done with. grad_norm: before
    clipping. micro_batch: rows of the largest micro-batch. noise_signal (U), noise_variance (T, in tokens), noise_ratio
    (rho) and noise_scale_tokens (B_noise), averages over the last steps, also with squares weighted as Adam weighs them
    (preconditioned), and noise_bounce (tau): None where they cannot be measured.
    """

    step: int
    tokens: int
    supervised_tokens: int
    total_tokens: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    num_micro_batches: int
    micro_batch: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    noise_signal: float | None = None
    noise_variance: float | None = None
    noise_ratio: float | None = None
    noise_scale_tokens: float | None = None
    noise_scale_preconditioned_tokens: float | None = None
    noise_bounce: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalMetrics:
    """One evaluation, after `step` steps. eval_loss: mean over all supervised tokens of the held-out rows;
    eval_perplexity is its exponential. eval_accuracy: share of these tokens that are the model's first choice."""

    step: int
    total_tokens: int
    eval_loss: float
    eval_perplexity: float
    eval_accuracy: float
    eval_tokens: int
    seconds: float
    peak_allocated_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """Something worth a line in the run's log. time: seconds since 1970. kind: one word with underscores, such as
    out_of_memory, retry, micro_batch, checkpoint, resume. message: one sentence for a person."""

    time: float
    step: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The run in numbers; unknown is None. train_loss: of the last step. seconds: at work, over all sessions, with
    evaluations and saving; tokens_per_second: of all of them.

    predicted_*_bytes and measured_*_bytes: both of the second optimizer step; measured ones are None until it is done.
    peak_*_bytes: the largest that was measured in the whole run, evaluations included. On a CPU "reserved" is what is
    resident above the state before the model was loaded, "device" all that is resident. total_steps: how many the run
    is to have; None where its length is in tokens or its batch grows.
    """

    schema: int = SCHEMA
    status: Status = "running"
    steps: int = 0
    total_steps: int | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
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
        """The run's peak wherever one number stands for it: reserved, where that was not measured the device's."""
        return self.peak_reserved_bytes or self.peak_device_bytes

    def __repr__(self) -> str:
        """In a sentence; the fields hold all of it."""
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
    """What a metrics file holds. damaged_lines: the numbers, from 1, of complete lines that could not be read."""

    steps: tuple[StepMetrics, ...]
    evals: tuple[EvalMetrics, ...]
    damaged_lines: tuple[int, ...] = ()


Record = TypeVar("Record", bound="DataclassInstance")


def append_line(
    path: Path, record: "DataclassInstance", *, leave_out_unknown: bool = False
) -> None:
    """leave_out_unknown: a field that is None is not written. Raises RunDirectoryError where the line cannot be written
    whole."""
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
    """Append it whole or not at all. Raises OSError."""
    with _WRITING, open(path, "ab+", buffering=0, opener=open_plain) as file:
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(-1, os.SEEK_END)
            if (
                file.read(1) != b"\n"
            ):  # what a killed writer left: end it, so that it spoils one line only
                line = b"\n" + line
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def read_metrics(path: Path) -> Metrics:
    """A run that was resumed from an earlier step did the later ones again: the lines of the second time count.

    Raises RunDirectoryError where the file cannot be opened.
    """
    steps: list[StepMetrics] = []
    evals: list[EvalMetrics] = []
    damaged = [
        number for number, content in read_lines(path) if not add_line(content, steps, evals)
    ]
    return Metrics(tuple(steps), tuple(evals), tuple(damaged))


def add_line(
    content: Mapping[str, Any] | None, steps: list[StepMetrics], evals: list[EvalMetrics]
) -> bool:
    """Add a line of metrics to those before it; False where it cannot be read."""
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
    """In the order written; damaged lines are left out. Raises RunDirectoryError where the file cannot be opened."""
    return tuple(read_records(path, RunEvent))


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The lines of a file that hold a `kind`, in the order written. Raises RunDirectoryError where it cannot be
    opened."""
    for _, content in read_lines(path):
        if content is not None and (record := as_record(kind, content)) is not None:
            yield record


def summary_json(summary: Summary) -> dict[str, Any]:
    """As `write_json` takes it."""
    return as_json(summary)


def as_json(record: "DataclassInstance") -> dict[str, Any]:
    """As it is written: a number that is not finite as a word."""
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(record).items()
    }


def read_summary(path: Path) -> Summary:
    """Raises RunDirectoryError where it is missing, damaged or of another version."""
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


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Each complete line, numbered from 1, as an object; None where it is not one."""
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


def as_record(kind: type[Record], content: Mapping[str, Any]) -> Record | None:
    """None where a needed field is missing or one is of the wrong type; fields of a later version are passed over."""
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
def _fields(kind: type["DataclassInstance"]) -> dict[str, tuple[Any, ...]]:
    """The types that each field accepts."""
    wanted = get_type_hints(kind)
    return {
        field.name: get_args(hint)
        if isinstance(hint := wanted[field.name], types.UnionType)
        else (hint,)
        for field in fields(kind)
    }


def _value(accepted: tuple[Any, ...], value: Any) -> Any:
    """Of another type than those in the record: a number without decimals, a word for one that is not finite, one of
    several words."""
    if float in accepted and (value in ("nan", "inf", "-inf") or type(value) is int):
        return float(value)
    if isinstance(value, str) and int not in accepted:
        return value
    raise ValueError(f"{value!r} is not one of {accepted}")
