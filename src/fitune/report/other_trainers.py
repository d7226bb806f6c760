"""Reads the records of other trainers as RecordedRun, so that their runs can be compared with ours.

    trainer_state.json    transformers' Trainer and TRL: `log_history` has an object for each log;
                          TRL adds num_tokens
    trainer_log.jsonl     LLaMA-Factory's callback: current_steps, loss, lr, throughput; vram_* with
                          RECORD_VRAM=1
    logging.jsonl         ms-swift: 'global_step/max_steps': '5/20'
    any other .jsonl      lines with a step and a loss
    a .csv                an export of wandb: Step, train/loss, or a column 'NAME - train/loss'
    events.out.tfevents*  TensorBoard, read by its own library
    a text                minimind's lines:
                          Epoch:[1/2](100/1000), loss: 2.5, lr: 0.00003, epoch_time: 4.0min
                          or the output of transformers' Trainer:
                          {'loss': '2.9', 'grad_norm': '1.2', 'epoch': '0.1'}

The name of each value is looked up in `_NAMES`. A value that a format lacks is nan. So is a count
of 0, which trainers write that do not count. Nothing is estimated.
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.plain_files import MAX_LOG_BYTES, read_plain
from fitune.report.run_on_disk import (
    EVAL_COLUMNS,
    MEMORY_COLUMNS,
    TRAIN_COLUMNS,
    RecordedRun,
    make_curve,
    seconds_at,
)
from fitune.units import GIB

#: our name of a value -> other trainers' names of it
_NAMES = {
    "loss": ("loss",),
    "lr": ("learning_rate", "lr"),
    "grad_norm": ("grad_norm",),
    "eval_loss": ("eval_loss",),
    "total_tokens": ("num_tokens", "num_input_tokens_seen", "total_tokens"),
    "tokens_per_second": ("throughput", "tokens_per_second"),
    "eval_accuracy": ("eval_mean_token_accuracy", "eval_accuracy"),
}
#: values where 0 means that nobody counted
_COUNTS = ("total_tokens", "tokens_per_second")
#: a larger text is not searched for the output of a trainer
_LOG_BYTES = 64 * 1024 * 1024
_MINIMIND = re.compile(r"Epoch:\s*\[(\d+)/\d+\]\s*\((\d+)/(\d+)\)(.*)")
_PAIR = re.compile(r"([A-Za-z_]+)\s*:\s*([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|nan|inf))")
_PRINTED = re.compile(r"\{([^{}]*['\"](?:eval_)?loss['\"]: [^{}]*)\}")
_PRINTED_PAIR = re.compile(
    r"['\"](\w+)['\"]: ['\"]?([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|[nN]a[nN]|[iI]nf(?:inity)?))\b"
)
#: the names of the step, in order of preference
_STEPS = (
    "step",
    "current_steps",
    "global_step/max_steps",
    "global_step",
    "train/global_step",
    "_step",
    "Step",
)
_PRINTED_TOTAL = re.compile(
    r"(Num examples|Num Epochs|Total train batch size|Total optimization steps)[^=\n]* = ([\d,]+)"
)


def find_foreign(path: Path) -> RecordedRun | None:
    """Return the run of another trainer in a file or directory, or None if there is none.

    Raises RunDirectoryError for a damaged record.
    """
    if path.is_file():
        if path.suffix == ".json":
            return read_trainer_state(path)
        if path.suffix == ".jsonl":
            return read_trainer_log(path)
        if path.suffix == ".csv":
            return read_exported(path)
        if "tfevents" in path.name:
            return read_tensorboard(path)
        return read_minimind(path) or read_printed(path)
    if not path.is_dir():
        return None
    for name, read in (
        ("trainer_log.jsonl", read_trainer_log),
        ("logging.jsonl", read_trainer_log),
        ("trainer_state.json", read_trainer_state),
    ):
        found = [*path.glob(name), *path.glob(f"checkpoint-*/{name}")]
        if found:
            return read(max(found, key=_step_of))
    return read_tensorboard(path) if any(path.rglob("*tfevents*")) else None


def _step_of(file: Path) -> tuple[int, bool]:
    """Return a sort key of a record: its last step, and whether it is the record of the whole run.

    The step is in the name of its checkpoint, else in the file. The time of the file says nothing,
    since files may have been copied.
    """
    if match := re.fullmatch(r"checkpoint-(\d+)", file.parent.name):
        return int(match[1]), False
    found = re.findall(
        r'"(?:global_step|current_steps|global_step/max_steps)": *"?(\d+)', _text(file)
    )
    return max(map(int, found), default=0), True


def read_trainer_state(path: Path) -> RecordedRun:
    """Read the trainer_state.json of transformers or TRL."""
    content = _json(path)
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise RunDirectoryError(
            f"{path} has no log_history: it is no trainer_state.json of transformers"
        )
    entries = [entry for entry in history if isinstance(entry, dict)]
    micro = content.get("train_batch_size")
    settings = {"batch.micro": micro} if isinstance(micro, int) else {}
    return _run(path, "transformers", entries, settings=settings)


def read_trainer_log(path: Path) -> RecordedRun:
    """Read the log of LLaMA-Factory, ms-swift, or another trainer that writes JSON lines.

    LLaMA-Factory's vram_reserved and vram_allocated are in GB of 1024^3 bytes.
    """
    entries = []
    origin = "json"
    for line in _text(path).splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or (step := _logged_step(entry)) is None:
            continue
        if "current_steps" in entry:
            origin = "llama-factory"
        elif "global_step/max_steps" in entry:
            origin = "ms-swift"
        entry |= {"step": step, "seconds": _clock(entry.get("elapsed_time"))}
        for name in ("allocated", "reserved"):
            if isinstance(value := entry.get(f"vram_{name}"), int | float):
                entry[f"peak_{name}_bytes"] = value * GIB
        if isinstance(value := entry.get("memory(GiB)"), int | float):
            entry["peak_reserved_bytes"] = value * GIB
        entries.append(_without_prefixes(entry))
    if not any("loss" in entry or "eval_loss" in entry for entry in entries):
        raise RunDirectoryError(
            f"{path} has no line with a step and a loss: it is no trainer_log.jsonl of LLaMA-Factory, no logging.jsonl "
            "of ms-swift, and no other log of steps"
        )
    return _run(path, origin, entries)


def _logged_step(entry: Mapping[str, object]) -> int | None:
    value = next((entry[name] for name in _STEPS if entry.get(name) is not None), None)
    # ms-swift writes '5/20'
    number = _number(value.partition("/")[0] if isinstance(value, str) else value)
    return None if isinstance(value, bool) or not math.isfinite(number) else round(number)


def _without_prefixes(entry: Mapping[str, object]) -> dict[str, object]:
    """Remove the prefixes with which transformers names values for trackers.

    {'train/loss': 2, 'eval/loss': 3} -> {'loss': 2, 'eval_loss': 3}
    """
    plain: dict[str, object] = {}
    for name, value in entry.items():
        kind, _, rest = str(name).rpartition("/")
        plain[rest if kind == "train" else f"eval_{rest}" if kind == "eval" else name] = value
    return plain


def read_exported(path: Path) -> RecordedRun | None:
    """Read a csv that wandb exported: a history, or a chart of one run.

    Returns None for another csv. Raises RunDirectoryError for a chart of several runs.
    """
    rows = list(csv.DictReader(_text(path).lstrip("\ufeff").splitlines()))
    names = [
        name for name in (rows[0] if rows else ()) if name and not name.endswith(("__MIN", "__MAX"))
    ]
    if not any(name in _STEPS for name in names):
        return None
    short = {name: name.rpartition(" - ")[2] for name in names}
    if len(set(short.values())) < len(names):
        raise RunDirectoryError(f"{path} holds several runs: export each into a file of its own")
    entries = []
    for row in rows:
        entry = {short[name]: row[name] for name in names if row[name] not in (None, "")}
        if (step := _logged_step(entry)) is not None:
            entries.append(_without_prefixes(entry) | {"step": step})
    has_loss = any("loss" in entry or "eval_loss" in entry for entry in entries)
    return _run(path, "wandb", entries) if has_loss else None


def read_tensorboard(path: Path) -> RecordedRun:
    """Read TensorBoard's scalars with transformers' names (train/loss, eval/loss) or no prefix.

    Raises RunDirectoryError if tensorboard is not installed, or if there is no loss.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RunDirectoryError(
            f"{path} is TensorBoard's: reading it needs pip install tensorboard"
        ) from error
    rows: dict[int, dict[str, Any]] = {}
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob("*tfevents*") if file.is_file())
    times: list[float] = []
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            kind, _, name = tag.rpartition("/")
            for event in events.Scalars(tag):
                full = f"eval_{name}" if kind == "eval" else name
                rows.setdefault(event.step, {"step": event.step})[full] = event.value
                times.append(event.wall_time)
                rows[event.step].setdefault("wall_time", event.wall_time)
    start = min(times, default=0.0)
    entries = [row | {"seconds": row["wall_time"] - start} for _, row in sorted(rows.items())]
    if not any("loss" in entry or "eval_loss" in entry for entry in entries):
        raise RunDirectoryError(f"{path} has no scalar named loss, train/loss or eval/loss")
    return _run(path, "tensorboard", entries)


def read_minimind(path: Path) -> RecordedRun | None:
    """Read the output of minimind, which counts micro-batches, not optimizer steps.

    Returns None for a text without minimind's lines.
    """
    if path.stat().st_size > _LOG_BYTES:
        return None
    entries = []
    for match in _MINIMIND.finditer(_text(path)):
        epoch, step, per_epoch = (int(match[index]) for index in (1, 2, 3))
        pairs = _PAIR.findall(match[4])
        # text that only looks like a number, such as '1.2.3', is left out
        values = {
            name.lower(): number
            for name, text in pairs
            if not math.isnan(number := _number(text)) or text.lower() == "nan"
        }
        entries.append(values | {"step": (epoch - 1) * per_epoch + step})
    if not any("loss" in entry for entry in entries):
        return None
    return _run(
        path, "minimind", entries, notes=(f"{path}: a step of minimind's log is a micro-batch",)
    )


def read_printed(path: Path) -> RecordedRun | None:
    """Read the output of transformers' Trainer, with numbers in quotes or without.

    The lines contain epochs, and the beginning of the output contains how many steps an epoch has;
    without it every line counts as a step. Returns None for a text without such lines.
    """
    if path.stat().st_size > _LOG_BYTES:
        return None
    text = _text(path)
    lines = [dict(_PRINTED_PAIR.findall(match[1])) for match in _PRINTED.finditer(text)]
    if not any("loss" in line or "eval_loss" in line for line in lines):
        return None
    notes: tuple[str, ...] = ()
    if (per_epoch := _steps_per_epoch(text)) is not None:
        places = [round(_number(line.get("epoch", 0)) * per_epoch) for line in lines]
    else:
        places = list(range(1, len(lines) + 1))
        notes = (f"{path}: its steps are not told, so each line counts as one",)
    entries = [
        {name: _number(value) for name, value in line.items()} | {"step": step}
        for line, step in zip(lines, places, strict=True)
    ]
    return _run(path, "transformers", entries, notes=notes)


def _steps_per_epoch(text: str) -> float | None:
    """Return the steps of an epoch from the lines that the Trainer prints before the first step.

    They are samples / batch, else all steps / epochs, which is less if max_steps ends the run.
    """
    totals = {name: int(number.replace(",", "")) for name, number in _PRINTED_TOTAL.findall(text)}
    if totals.get("Total train batch size") and "Num examples" in totals:
        return -(-totals["Num examples"] // totals["Total train batch size"])
    if totals.get("Num Epochs") and "Total optimization steps" in totals:
        return totals["Total optimization steps"] / totals["Num Epochs"]
    return None


def _run(
    path: Path,
    origin: str,
    entries: Sequence[Mapping[str, object]],
    *,
    settings: Mapping[str, object] | None = None,
    notes: tuple[str, ...] = (),
) -> RecordedRun:
    """Make a RecordedRun of logged entries.

    entries: in the order of the log, each with its step. An entry may have values of training, of
    an evaluation, or of both.
    """
    named = [dict(_named(entry)) for entry in entries if isinstance(entry.get("step"), int)]
    named, restart = _last_pass(named)
    if restart is not None:
        again = (
            f"{path}: logged again from step {restart:,} on: what stood there before is left out"
        )
        notes = (*notes, again)
    trained = [entry for entry in named if "loss" in entry]
    evaluated = [entry for entry in named if "eval_loss" in entry]
    train = make_curve(TRAIN_COLUMNS, _last_of_each_step(trained))
    evals = make_curve(EVAL_COLUMNS, _last_of_each_step(evaluated))
    if np.isnan(evals["total_tokens"]).any() and len(train["step"]):
        tokens = np.interp(evals["step"], train["step"], train["total_tokens"])
        evals = dict(evals) | {"total_tokens": tokens}
    if len(train["step"]):
        evals = dict(evals) | {"seconds": seconds_at(train, evals["step"])}
    directory = path if path.is_dir() else path.parent
    is_checkpoint = directory.name.startswith("checkpoint-")
    return RecordedRun(
        name=directory.parent.name if is_checkpoint else directory.name or path.stem,
        path=str(path),
        origin=origin,
        state="n/a",
        settings=settings or {},
        summary={},
        train=train,
        evals=evals,
        memory=make_curve(MEMORY_COLUMNS, []),
        notes=notes,
    )


def _named(entry: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the values of an entry under our names, without counts of 0."""
    entry = {
        name: _number(value) if isinstance(value, str) else value for name, value in entry.items()
    }
    found = {name: entry[name] for name in {*TRAIN_COLUMNS, *EVAL_COLUMNS} & entry.keys()}
    has_nan_gradient = "grad_norm" in entry and math.isnan(_number(entry["grad_norm"]))
    # transformers logs a loss of 0 where the loss is not a number
    if _number(entry.get("loss")) == 0 and has_nan_gradient:
        entry["loss"] = found["loss"] = math.nan
    for ours, theirs in _NAMES.items():
        for name in theirs:
            if name in entry:
                found[ours] = entry[name]
                break
    yield from (
        (name, value) for name, value in found.items() if name not in _COUNTS or _number(value) > 0
    )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _last_pass(entries: Sequence[dict[str, Any]]) -> tuple[list[dict[str, object]], int | None]:
    """Return the entries without those that a restart of the training replaced.

    Also returns the first step after the last restart, or None if there was no restart.
    """
    remaining: list[dict[str, object]] = []
    restart = None
    for entry in entries:
        if remaining and entry["step"] < remaining[-1]["step"]:
            restart = entry["step"]
            remaining = [each for each in remaining if each["step"] < restart]
        remaining.append(entry)
    return remaining, restart


def _last_of_each_step(entries: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the last entry of each step."""
    return list({entry["step"]: entry for entry in entries}.values())


def _clock(text: object) -> float | None:
    """Return the seconds of a timedelta as Python writes it: '1 day, 0:00:12'."""
    match = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d+):(\d+)(?:\.\d+)?", str(text))
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _text(path: Path) -> str:
    try:
        return read_plain(path, most_bytes=MAX_LOG_BYTES, follow=True).decode("utf-8", "replace")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error


def _json(path: Path) -> Any:
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from error
