"""Implement `fitune runs`, which lists runs, one line each."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fitune.cli.output import Format, console, print_json, print_text, table, warn
from fitune.cli.watch_screen import progress_of
from fitune.language import say
from fitune.language.printable import printable_line
from fitune.run.directory import BEGIN_ONE, RunRecord, list_runs
from fitune.run.follow import RunFollower, RunView
from fitune.run.metrics import Summary, summary_json
from fitune.run.progress import seconds_left
from fitune.units import format_count, format_gib, format_seconds

TAIL_BYTES = 2**18
_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "crashed": "red",
    "damaged": "red",
}


def runs(
    directory: Annotated[Path, Parameter(help="where runs are kept")] = Path("runs"),
    /,
    *,
    output_format: Format = "auto",
) -> None:
    """List the runs in a directory, the latest last, with the remaining time of running ones.

    The states are running, finished, stopped (by the user or by stop_after), failed (with an
    error message), crashed (the process ended without one) and damaged (unreadable summary).
    """
    records = list_runs(directory)
    for record in records:
        if record.fault:
            warn(record.fault)
    if output_format == "json":
        print_json({"runs": [_json(record) for record in records]})
    elif output_format == "quiet":
        for record in records:
            print_text(printable_line(record.run.name))
    elif not records:
        warn(f"there are no runs in {directory}: {BEGIN_ONE}")
    else:
        columns = tuple(
            map(say, ("run", "state", ">steps", ">train", ">eval", ">peak GiB", ">tok/s", ">time"))
        )
        grid = table(columns, [_row(record) for record in records])
        for row, record in enumerate(records):
            grid.rows[row].style = _COLOURS.get(record.state)
        console(output_format).print(grid)


def _json(record: RunRecord) -> dict[str, object]:
    summary = None if record.summary is None else summary_json(record.summary)
    return {
        "name": record.run.name,
        "state": record.state,
        "updated": record.updated,
        "summary": summary,
    }


def _row(record: RunRecord) -> tuple[str, ...]:
    summary = record.summary or Summary()
    # The summary of such a run is as old as its last save.
    if record.state in ("running", "crashed"):
        view = RunFollower(record.run, tail_bytes=TAIL_BYTES).read()
        if view.steps:
            return _unsaved_row(view, summary)
    return (
        printable_line(record.run.name),
        say(record.state),
        f"{summary.steps:,}" if record.summary else "n/a",
        _loss(summary.train_loss),
        _loss(summary.eval_loss),
        format_gib(summary.peak_bytes),
        format_count(summary.tokens_per_second),
        _ago(record),
    )


def _unsaved_row(view: RunView, summary: Summary) -> tuple[str, ...]:
    """Return the row of a run whose metrics are newer than its summary."""
    record, last, done = view.record, view.steps[-1], progress_of(view)
    is_on = record.state == "running"
    return (
        printable_line(record.run.name),
        f"{say('running')} {done:.0%}" if is_on and done is not None else say(record.state),
        f"{last.step:,}",
        _loss(last.loss),
        _loss(view.evals[-1].eval_loss if view.evals else summary.eval_loss),
        format_gib(_peak_bytes(view, summary)),
        format_count(
            last.tokens_per_second if is_on else summary.tokens_per_second or last.tokens_per_second
        ),
        say("{time} left", time=format_seconds(seconds_left(record, view.samples)))
        if is_on
        else _ago(record),
    )


def _peak_bytes(view: RunView, summary: Summary) -> int | None:
    """Return the peak memory up to the last step, defined like `Summary.peak_bytes`."""
    reserved = (summary.peak_reserved_bytes, *(step.peak_reserved_bytes for step in view.steps))
    device = (summary.peak_device_bytes, *(step.device_used_bytes for step in view.steps))
    return max(filter(None, reserved), default=None) or max(filter(None, device), default=None)


def _ago(record: RunRecord) -> str:
    return say("{time} ago", time=_age(time.time() - record.updated))


def _loss(loss: float | None) -> str:
    return "n/a" if loss is None else f"{loss:.3f}"


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f}d" if seconds >= 2 * 86400 else format_seconds(max(0.0, seconds))
