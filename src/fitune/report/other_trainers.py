"""What other trainers leave -> RecordedRun, so that their runs stand beside ours.

    trainer_state.json    transformers' Trainer, TRL: `log_history`, one object a logging; TRL adds num_tokens
    trainer_log.jsonl     LLaMA-Factory's callback: current_steps, loss, lr, throughput; vram_* with RECORD_VRAM=1
    logging.jsonl         ms-swift: 'global_step/max_steps': '5/20'. Any other .jsonl with a step and a loss too
    a .csv                what wandb exports: Step, train/loss, or a column 'NAME - train/loss'
    events.out.tfevents*  TensorBoard, by its own library
    a text                minimind's lines: Epoch:[1/2](100/1000), loss: 2.5, lr: 0.00003, epoch_time: 4.0min
                          or what transformers' Trainer prints: {'loss': '2.9', 'grad_norm': '1.2', 'epoch': '0.1'}

Each name of a value is looked up in `_NAMES`; what a format does not have is nan, and so is a count of 0, which those
write that do not count. Nothing is estimated.
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
from fitune.report.run_on_disk import EVAL_COLUMNS, MEMORY_COLUMNS, TRAIN_COLUMNS, RecordedRun, make_curve, seconds_at
from fitune.units import GIB

_NAMES = {
    "loss": ("loss",),
    "lr": ("learning_rate", "lr"),
    "grad_norm": ("grad_norm",),
    "eval_loss": ("eval_loss",),
    "total_tokens": ("num_tokens", "num_input_tokens_seen", "total_tokens"),
    "tokens_per_second": ("throughput", "tokens_per_second"),
    "eval_accuracy": ("eval_mean_token_accuracy", "eval_accuracy"),
}
_COUNTS = ("total_tokens", "tokens_per_second")
_LOG_BYTES = 64 * 1024 * 1024
_MINIMIND = re.compile(r"Epoch:\s*\[(\d+)/\d+\]\s*\((\d+)/(\d+)\)(.*)")
_PAIR = re.compile(r"([A-Za-z_]+)\s*:\s*([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|nan|inf))")
_PRINTED = re.compile(r"\{([^{}]*['\"](?:eval_)?loss['\"]: [^{}]*)\}")
_PRINTED_PAIR = re.compile(r"['\"](\w+)['\"]: ['\"]?([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|[nN]a[nN]|[iI]nf(?:inity)?))\b")
_STEPS = ("step", "current_steps", "global_step/max_steps", "global_step", "train/global_step", "_step", "Step")
_PRINTED_TOTAL = re.compile(
    r"(Num examples|Num Epochs|Total train batch size|Total optimization steps)[^=\n]* = ([\d,]+)"
)


def find_foreign(path: Path) -> RecordedRun | None:
    """The run of another trainer in a file or directory, None where there is none. Raises RunDirectoryError for one
    that is damaged."""
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
    """How far a record goes: by the name of its checkpoint, else as it says; files copied later are no newer. Of two
    that go as far, the one of the whole run is taken."""
    if match := re.fullmatch(r"checkpoint-(\d+)", file.parent.name):
        return int(match[1]), False
    found = re.findall(r'"(?:global_step|current_steps|global_step/max_steps)": *"?(\d+)', _text(file))
    return max(map(int, found), default=0), True


def read_trainer_state(path: Path) -> RecordedRun:
    """transformers and TRL; `settings` are those that the state tells."""
    content = _json(path)
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise RunDirectoryError(f"{path} has no log_history: it is no trainer_state.json of transformers")
    entries = [entry for entry in history if isinstance(entry, dict)]
    micro = content.get("train_batch_size")
    return _run(path, "transformers", entries, settings={} if not isinstance(micro, int) else {"batch.micro": micro})


def read_trainer_log(path: Path) -> RecordedRun:
    """LLaMA-Factory, ms-swift, and others who write a line of JSON for each logging. LLaMA-Factory's vram_reserved and
    vram_allocated are in GB of 1024^3 bytes."""
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


def _logged_step(entry: Mapping[str, Any]) -> int | None:
    value = next((entry[name] for name in _STEPS if entry.get(name) is not None), None)
    number = _number(value.partition("/")[0] if isinstance(value, str) else value)
    return None if isinstance(value, bool) or not math.isfinite(number) else round(number)


def _without_prefixes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """{'train/loss': 2, 'eval/loss': 3} -> {'loss': 2, 'eval_loss': 3}, as transformers names them for trackers."""
    plain: dict[str, Any] = {}
    for name, value in entry.items():
        kind, _, rest = str(name).rpartition("/")
        plain[rest if kind == "train" else f"eval_{rest}" if kind == "eval" else name] = value
    return plain


def read_exported(path: Path) -> RecordedRun | None:
    """What wandb exports as csv: a history, or one chart, whose columns are of one run. None for another csv."""
    rows = list(csv.DictReader(_text(path).lstrip("\ufeff").splitlines()))
    names = [name for name in (rows[0] if rows else ()) if name and not name.endswith(("__MIN", "__MAX"))]
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
    return _run(path, "wandb", entries) if any("loss" in e or "eval_loss" in e for e in entries) else None


def read_tensorboard(path: Path) -> RecordedRun:
    """Scalars named as transformers names them (train/loss, eval/loss), or without a prefix."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RunDirectoryError(f"{path} is TensorBoard's: reading it needs pip install tensorboard") from error
    rows: dict[int, dict[str, Any]] = {}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*tfevents*") if file.is_file())
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
    """None for a text without its lines. It counts micro-batches, not optimizer steps."""
    if path.stat().st_size > _LOG_BYTES:
        return None
    entries = []
    for match in _MINIMIND.finditer(_text(path)):
        epoch, step, per_epoch = (int(match[index]) for index in (1, 2, 3))
        pairs = _PAIR.findall(match[4])
        values = {
            name.lower(): number
            for name, text in pairs
            if not math.isnan(number := _number(text)) or text.lower() == "nan"
        }
        entries.append(values | {"step": (epoch - 1) * per_epoch + step})
    if not any("loss" in entry for entry in entries):
        return None
    return _run(path, "minimind", entries, notes=(f"{path}: a step of minimind's log is a micro-batch",))


def read_printed(path: Path) -> RecordedRun | None:
    """What transformers' Trainer prints, with numbers in quotes or without; None for a text without its lines. The
    lines tell epochs, and the beginning how many steps these are; without it the lines are counted."""
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
    """As the lines before the first step tell: rows / batch, or all steps / epochs, less where max_steps ends it."""
    told = {name: int(number.replace(",", "")) for name, number in _PRINTED_TOTAL.findall(text)}
    if told.get("Total train batch size") and "Num examples" in told:
        return -(-told["Num examples"] // told["Total train batch size"])
    if told.get("Num Epochs") and "Total optimization steps" in told:
        return told["Total optimization steps"] / told["Num Epochs"]
    return None


def _run(
    path: Path,
    origin: str,
    entries: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> RecordedRun:
    """entries: in the order logged, each with its step; an entry may be of training, of an evaluation, or both."""
    named = [dict(_named(entry)) for entry in entries if isinstance(entry.get("step"), int)]
    named, restart = _last_pass(named)
    if restart is not None:
        again = f"{path}: logged again from step {restart:,} on: what stood there before is left out"
        notes = (*notes, again)
    train = make_curve(TRAIN_COLUMNS, _forward([entry for entry in named if "loss" in entry]))
    evals = make_curve(EVAL_COLUMNS, _forward([entry for entry in named if "eval_loss" in entry]))
    if np.isnan(evals["total_tokens"]).any() and len(train["step"]):
        tokens = np.interp(evals["step"], train["step"], train["total_tokens"])
        evals = dict(evals) | {"total_tokens": tokens}
    if len(train["step"]):
        evals = dict(evals) | {"seconds": seconds_at(train, evals["step"])}
    directory = path if path.is_dir() else path.parent
    return RecordedRun(
        name=directory.parent.name if directory.name.startswith("checkpoint-") else directory.name or path.stem,
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


def _named(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Under our names; a value that is already so named is kept. Counts of 0 are left out: nobody counted."""
    entry = {name: _number(value) if isinstance(value, str) else value for name, value in entry.items()}
    found = {name: entry[name] for name in {*TRAIN_COLUMNS, *EVAL_COLUMNS} & entry.keys()}
    if _number(entry.get("loss")) == 0 and "grad_norm" in entry and math.isnan(_number(entry["grad_norm"])):
        entry["loss"] = found["loss"] = math.nan  # transformers logs 0 where the loss is no number
    for ours, theirs in _NAMES.items():
        for name in theirs:
            if name in entry:
                found[ours] = entry[name]
                break
    yield from ((name, value) for name, value in found.items() if name not in _COUNTS or _number(value) > 0)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _last_pass(entries: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], int | None]:
    """A log that goes on after a restart: what the restart logged again takes the place of what stood from there on.
    With the step of the last restart, None where there was none."""
    kept: list[dict[str, Any]] = []
    restart = None
    for entry in entries:
        if kept and entry["step"] < kept[-1]["step"]:
            restart = entry["step"]
            kept = [each for each in kept if each["step"] < restart]
        kept.append(entry)
    return kept, restart


def _forward(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a step that was logged twice the last one."""
    return list({entry["step"]: entry for entry in entries}.values())


def _clock(text: Any) -> float | None:
    """'1 day, 0:00:12' as Python writes a timedelta -> seconds."""
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
