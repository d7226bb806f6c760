"""Lay out the screen of `fitune watch` for a terminal of any size.

It shows the name and the progress of a run, what holds the memory of its device, the loss, and its
events. Nothing here reads files or waits.
"""

import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from fitune.language import pad, say, translated
from fitune.language.printable import printable, printable_line
from fitune.run.follow import RunView
from fitune.run.memory import MemorySample
from fitune.run.metrics import as_json
from fitune.run.progress import known_total_steps, progress_fraction, seconds_left
from fitune.units import format_bytes, format_count, format_gib, format_seconds

STATE_STYLES = {"running": "bold cyan", "finished": "bold green", "stopped": "bold yellow"}
SILENCE_SECONDS = 15.0
SPEED_STEPS = 20
MIN_EVENT_LINES = 6
MAX_CHART_HEIGHT = 12
MAX_ANSWER_LINES = 3
MAX_COLUMNS_PER_STEP = 4
#: Spaces, words, and single Chinese characters with the punctuation behind them.
_PARTS = re.compile(r"\s+|[\u2e80-\uffef][，。：；、）]*|[^\s\u2e80-\uffef]+")
ASCII = str.maketrans(
    {"█": "#", "▌": "#", "·": ".", "│": "|", "°": " ", "…": "~", "×": "x"}
) | str.maketrans("▁▂▃▄▅▆▇", "..::++*")


@dataclass(frozen=True, slots=True)
class MemoryClass:
    """A part of the device's memory."""

    name: str
    #: The name on the screen, in the chosen language.
    label: str
    now_bytes: int
    #: The most that this part has held; for free memory, the least.
    peak_bytes: int
    style: str


def watch_screen(view: RunView, *, width: int, height: int | None, now: float) -> Text:
    """Return the screen, of at most `height` lines of at most `width` columns.

    height: None for as many lines as needed.
    """
    head, numbers = list(_head(view, width=width, now=now)), [*_numbers(view), *_answers(view)]
    memory, events = list(_memory(view, width=width)), list(_events(view, width=width))
    chart_height, room = 1, sum(map(len, events))
    if height is not None:
        left = height - len(head) - len(numbers) - len(memory)
        if left < 1:
            memory, left = [], left + len(memory)
        chart_height = max(1, min(MAX_CHART_HEIGHT, left - MIN_EVENT_LINES, left // 2))
        room = left - chart_height
    while events and sum(map(len, events)) > room:
        events.pop(0)
    chart = _chart(view, width=width, height=chart_height)
    lines = [*head, *memory, *chart, *numbers, *(line for event in events for line in event)][
        :height
    ]
    text = Text("\n").join(_cut(line, width) for line in lines)
    text.no_wrap = True
    return text


def watch_json(view: RunView, *, now: float) -> dict[str, object]:
    """Return the content of the screen as a JSON object: sizes in bytes, None for unknown."""
    progress = progress_of(view)
    return {
        "run": str(view.record.run.path),
        "state": view.record.state,
        "time": now,
        "progress_fraction": progress,
        "total_steps": _total_steps(view),
        "seconds": _elapsed_seconds(view, now),
        "seconds_left": seconds_left(view.record, view.samples),
        "budget_bytes": view.budget_bytes,
        "device": view.device_name,
        "memory": {
            part.name: {"now_bytes": part.now_bytes, "peak_bytes": part.peak_bytes}
            for part in memory_classes(view)
        },
        "step": as_json(view.steps[-1]) if view.steps else None,
        "eval": as_json(view.evals[-1]) if view.evals else None,
        "answers": [as_json(line) for line in view.answers],
        "sample": as_json(view.samples[-1]) if view.samples else None,
        "events": [as_json(event) for event in view.events[-20:]],
    }


def memory_classes(view: RunView) -> list[MemoryClass]:
    """Return the parts of the device's memory in the order of their bars.

    Returns an empty list before the first memory sample.
    """
    if not view.samples or view.samples[-1].device_total_bytes is None:
        return []
    if view.samples[-1].allocated_bytes is None:
        table, peak = _on_cpu, max((step.device_used_bytes or 0 for step in view.steps), default=0)
    else:
        table, peak = (
            _on_card,
            max((step.peak_allocated_bytes or 0 for step in view.steps), default=0),
        )
    labels = _labels()
    history = [table(sample) for sample in view.samples]
    now, found = history[-1], []
    for name, held in now.items():
        values = [parts.get(name, 0) for parts in history]
        most = min(values) if name == "free" else max(values)
        if name == "activations":
            most = max([_peak_activations(sample) for sample in view.samples])
            most = max(most, peak - now["state"] - now.get("program", 0))
        label, style = labels[name]
        found.append(MemoryClass(name, label, held, most, style))
    return found


def _labels() -> dict[str, tuple[str, str]]:
    return {
        "program": (say("program"), "magenta"),
        "state": (say("weights, gradients, optimizer"), "blue"),
        "activations": (say("activations, temporaries"), "red"),
        "cache": (say("cache (reserved, not in use)"), "yellow"),
        "context": (say("CUDA context"), "magenta"),
        "others": (say("other processes"), "bright_black"),
        "free": (say("free"), "green"),
    }


def _on_card(sample: MemorySample) -> dict[str, int]:
    allocated, reserved = sample.allocated_bytes or 0, sample.reserved_bytes or 0
    used, others = sample.device_used_bytes or 0, sample.other_processes_bytes or 0
    state = min(sample.state_bytes or 0, allocated)
    return {
        "state": state,
        "activations": allocated - state,
        "cache": reserved - allocated,
        "context": max(0, used - others - reserved),
        "others": others,
        "free": max(0, (sample.device_total_bytes or 0) - used),
    }


def _on_cpu(sample: MemorySample) -> dict[str, int]:
    held, program = sample.process_bytes or 0, sample.program_bytes or 0
    state = min(sample.state_bytes or 0, max(0, held - program))
    return {
        "program": min(program, held),
        "state": state,
        "activations": max(0, held - program - state),
        "others": sample.other_processes_bytes or 0,
        "free": max(0, (sample.device_total_bytes or 0) - (sample.device_used_bytes or 0)),
    }


def _peak_activations(sample: MemorySample) -> int:
    if sample.allocated_bytes is None:
        return (
            (sample.peak_process_bytes or 0)
            - (sample.program_bytes or 0)
            - (sample.state_bytes or 0)
        )
    return (sample.peak_allocated_bytes or 0) - (sample.state_bytes or 0)


def _head(view: RunView, *, width: int, now: float) -> Iterator[Text]:
    record = view.record
    line = Text(printable_line(record.run.name), style="bold")
    line.append(f"  {say(record.state)}", style=STATE_STYLES.get(record.state, "bold red"))
    line.append(f"  {format_seconds(_elapsed_seconds(view, now))}")
    step = view.steps[-1].step if view.steps else 0
    total, progress = _total_steps(view), progress_of(view)
    of = "" if total is None or progress is None else f"/{total:,} ({progress:.1%})"
    place = f"  {say('step')} {step:,}{of}"
    if record.state == "running":
        place += f"  {say('left')} {format_seconds(seconds_left(view.record, view.samples))}"
    if line.cell_len + cell_len(place) > width:
        yield line
        yield Text(place.strip())
    else:
        yield line.append(place)
    if record.fault:
        yield Text(printable_line(record.fault), style="red")
    silence = now - record.updated
    if record.state == "running" and view.samples:
        silence = now - view.samples[-1].time
        if silence >= SILENCE_SECONDS:
            yield Text(
                say("no word for {seconds}", seconds=format_seconds(silence)), style="yellow"
            )


def _memory(view: RunView, *, width: int) -> Iterator[Text]:
    parts = memory_classes(view)
    if not parts:
        yield Text(say("memory: no sample yet"), style="dim")
        return
    total = view.samples[-1].device_total_bytes or 1
    title = f"{printable_line(view.device_name or say('card'))}, GiB"
    label_width = max(cell_len(part.label) for part in parts) + 1
    bar_width = max(10, width - label_width - 2 * 8 - 2)
    heading = f"{_fit(title, label_width)}{_right(say('now'), 8)}{_right(say('peak'), 8)}  "
    yield Text(heading + _scale(total, bar_width), style="bold")
    start = 0
    budget = (
        None
        if view.budget_bytes is None
        else min(bar_width - 1, round(view.budget_bytes / total * bar_width))
    )
    for part in parts:
        line = Text(
            pad(part.label, label_width)
            + f"{format_gib(part.now_bytes):>8}{format_gib(part.peak_bytes):>8}  "
        )
        first, last = start / total * bar_width, (start + part.now_bytes) / total * bar_width
        line.append_text(_bar(first, last, width=bar_width, part=part, budget=budget))
        start += part.now_bytes
        yield line
    if view.budget_bytes is not None:
        yield Text(
            " " * (label_width + 18)
            + _marker(budget or 0, bar_width, say("memory limit"), view.budget_bytes)
        )


def _bar(first: float, last: float, *, width: int, part: MemoryClass, budget: int | None) -> Text:
    """Return a bar from column `first` to `last`. A part that is not empty fills half a column."""
    left, right = min(int(first), width - 1), min(round(last), width)
    cells = [" "] * width
    if part.now_bytes:
        fill = "·" if part.name == "free" else "█"
        for column in range(left, max(right, left + 1)):
            cells[column] = fill
        if right <= left and part.name != "free":
            cells[left] = "▌"
    if budget is not None and cells[budget] in " ·":
        cells[budget] = "│"
    return Text("".join(cells).rstrip(), style=part.style)


def _scale(total: int, width: int) -> str:
    """Return the axis from 0 to the device's memory, with quarters if there is space for them."""
    marks = [0, 4] if width < 40 else [0, 1, 2, 3, 4]
    cells = [" "] * width
    for mark in marks:
        text = format_gib(total * mark // 4, 1) if mark else "0"
        start = min(width - len(text), max(0, round(mark / 4 * width) - len(text) // 2))
        cells[start : start + len(text)] = text
    return "".join(cells)


def _marker(column: int, width: int, word: str, size: int) -> str:
    text = f"{word} {format_bytes(size)}"
    if cell_len(text) + 1 <= column:
        return " " * (column - cell_len(text) - 1) + text + " │"
    return " " * column + "│ " + text


def _chart(view: RunView, *, width: int, height: int) -> Iterator[Text]:
    """Yield a chart of the loss over the whole run, with the last evaluation to its right.

    Each column is the mean of several steps.
    """
    behind = _evaluation(view)
    if not view.steps:
        yield Text(say("loss: no step yet"), style="dim").append(behind, style="green")
        return
    label = f"{say('loss')} {view.steps[-1].loss:.3f} "
    room = max(8, width - cell_len(label) - cell_len(behind) - 1)
    means = _columns([step.loss for step in view.steps], min(room, len(view.steps)))
    means = [mean for mean in means for _ in range(min(MAX_COLUMNS_PER_STEP, room // len(means)))]
    highest = max((mean for mean in means if math.isfinite(mean)), default=math.nan)
    for number, row in enumerate(_blocks(means, height)):
        is_last = number == height - 1
        line = Text(label if is_last else " " * cell_len(label)).append(row, style="cyan")
        line.append(
            behind if is_last else f" {highest:.3f}" if number == 0 else "",
            style="green" if is_last else "dim",
        )
        yield line


def _evaluation(view: RunView) -> str:
    if not view.evals:
        return ""
    newest = view.evals[-1]
    text = f" {say('eval {loss:.3f} at step {step:,}', loss=newest.eval_loss, step=newest.step)}"
    best = min(
        (evaluation.eval_loss for evaluation in view.evals if evaluation.step > 0), default=None
    )
    return text if best is None or newest.eval_loss > best else f"{text}, {say('best')}"


def _columns(values: Sequence[float], count: int) -> list[float]:
    """Return the means of `count` parts of equal length; NaN for a part with a non-finite value."""
    bounds = [round(index * len(values) / count) for index in range(count + 1)]
    parts = [values[first:end] for first, end in pairwise(bounds)]
    return [statistics.fmean(part) if all(map(math.isfinite, part)) else math.nan for part in parts]


def _blocks(values: Sequence[float], height: int) -> list[str]:
    """Return lines of block characters that draw the values, with '!' for a non-finite value.

    The height of a column is a multiple of an eighth of a line; the lowest value is one eighth.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (8 * height - 1) / (high - low) if high > low else 0.0
    eighths = [
        1 + round((value - low) * scale) if math.isfinite(value) else None for value in values
    ]
    lines = []
    for row in range(height):
        eighths_below = 8 * (height - 1 - row)
        fills = [None if each is None else max(0, min(8, each - eighths_below)) for each in eighths]
        lines.append("".join("!" if fill is None else " ▁▂▃▄▅▆▇█"[fill] for fill in fills))
    return lines


def _numbers(view: RunView) -> Iterator[Text]:
    if view.steps:
        last = view.steps[-1]
        recent = view.steps[-SPEED_STEPS:]
        speed = sum(step.tokens for step in recent) / max(
            sum(step.seconds for step in recent), 1e-9
        )
        parts = [
            f"{format_count(speed)} {say('tokens/s')}",
            f"{last.micro_batch} × {last.num_micro_batches} {say('samples')}",
            f"lr {last.lr:.1e}",
            f"{say('gradient')} {last.grad_norm:.2f}",
            f"{format_count(last.total_tokens)} {say('tokens')}",
        ]
        yield Text(" · ".join(parts))
    if view.samples:
        yield Text(" · ".join(_device_parts(view.samples[-1])))


def _answers(view: RunView) -> Iterator[Text]:
    """Yield a line for each of the first prompts: the prompt, and its last answer."""
    for line in view.answers[:MAX_ANSWER_LINES]:
        at = say("step {step}", step=f"{line.step:,}")
        yield Text(printable_line(f"{at}  {line.prompt}  > ")).append(
            printable_line(" ".join(line.answer.split())), style="green"
        )


def _device_parts(sample: MemorySample) -> Iterator[str]:
    kind = "CPU" if sample.allocated_bytes is None else "GPU"
    yield (
        f"{kind} {'n/a' if sample.utilisation_fraction is None else f'{sample.utilisation_fraction:.0%}'}"
    )
    if sample.temperature_celsius is not None:
        yield f"{sample.temperature_celsius:.0f} °C"
    if sample.power_watts is not None:
        yield f"{sample.power_watts:.0f} W"
    if sample.throttled:
        yield say("slowed down by {reason}", reason=sample.throttled)
    if sample.spill_bytes:
        yield say("spill {size}", size=format_bytes(sample.spill_bytes))
    if sample.num_retries:
        yield say("{count} retries", count=sample.num_retries)
    if sample.num_ooms:
        yield say("{count} out of memory", count=sample.num_ooms)
    yield say("disk {size} free", size=format_bytes(sample.disk_free_bytes))


def _events(view: RunView, *, width: int) -> Iterator[list[Text]]:
    """Yield the lines of each event, wrapped to the width."""
    for event in view.events:
        at = f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.step:>6,}  "
        style = "yellow" if event.message.startswith("warning") else ""
        first, *others = _wrapped(printable(translated(event.message)), max(20, width - len(at)))
        yield [
            Text(at + first, style=style),
            *(Text(" " * len(at) + line, style=style) for line in others),
        ]


def _wrapped(message: str, width: int) -> list[str]:
    """Break a message at its spaces and between Chinese characters."""
    lines, gap = [""], ""
    for part in _PARTS.findall(message):
        if part.isspace():
            gap = " "
        elif lines[-1] and cell_len(lines[-1] + gap + part) > width:
            lines.append(part)
            gap = ""
        else:
            lines[-1] += gap + part if lines[-1] else part
            gap = ""
    return lines


def progress_of(view: RunView) -> float | None:
    """Return the share of the run (0 to 1) that is done, or None if unknown."""
    last_step = view.steps[-1].step if view.steps else None
    return progress_fraction(view.record, last_step, view.samples)


def _total_steps(view: RunView) -> int | None:
    """Return the number of steps that the run recorded, else an estimate from its progress."""
    if view.record.state == "finished":
        return view.steps[-1].step if view.steps else None
    if (known := known_total_steps(view.record)) is not None:
        return known
    # Use the step of the same sample, because the metrics may be newer.
    newest = view.samples[-1] if view.samples else None
    progress = None if newest is None else newest.progress_fraction
    return round(newest.step / progress) if newest is not None and progress else None


def _elapsed_seconds(view: RunView, now: float) -> float | None:
    is_on = view.record.state == "running" and view.samples
    return (
        None
        if view.seconds is None
        else view.seconds + (max(0.0, now - view.samples[-1].time) if is_on else 0.0)
    )


def _right(text: str, width: int) -> str:
    return " " * max(0, width - cell_len(text)) + text


def _fit(text: str, width: int) -> str:
    """Pad or cut text to exactly `width` columns, with an ellipsis if it is cut."""
    return pad(text, width) if cell_len(text) < width else set_cell_size(text, width - 2) + "… "


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line
