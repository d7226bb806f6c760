"""Implement `fitune runs`, which lists runs, one line each."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fitune.cli.output import Format, console, print_json, print_text, table, warn
from fitune.language import say
from fitune.language.printable import printable_line
from fitune.report.listing import list_run
from fitune.run.directory import BEGIN_ONE, RunRecord, list_runs
from fitune.run.metrics import summary_json
from fitune.units import format_count, format_gib, format_seconds

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
    run = list_run(record)
    is_on, done = record.state == "running", run.progress_fraction
    return (
        printable_line(record.run.name),
        f"{say('running')} {done:.0%}" if is_on and done is not None else say(record.state),
        "n/a" if run.steps is None else f"{run.steps:,}",
        _loss(run.train_loss),
        _loss(run.eval_loss),
        format_gib(run.peak_bytes),
        format_count(run.tokens_per_second),
        say("{time} left", time=format_seconds(run.seconds_left))
        if is_on and run.seconds_left is not None
        else _ago(record),
    )


def _ago(record: RunRecord) -> str:
    return say("{time} ago", time=_age(time.time() - record.updated))


def _loss(loss: float | None) -> str:
    return "n/a" if loss is None else f"{loss:.3f}"


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f}d" if seconds >= 2 * 86400 else format_seconds(max(0.0, seconds))
