"""Implement `fitune compare`, which shows runs side by side at equal tokens."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fitune.cli.arguments import run_path
from fitune.cli.output import OUTPUT, Screen, console, print_json, print_text, table
from fitune.errors import UsageError
from fitune.language import translated
from fitune.language.printable import printable_line
from fitune.report import tables
from fitune.report.compare import Comparison
from fitune.report.compare import compare as compare_runs
from fitune.report.verdicts import verdicts

Runs = Annotated[
    Path,
    Parameter(
        name="RUN",
        help="a run's directory or name, a directory of runs, a report of fitune, or what "
        "another trainer left: trainer_state.json, trainer_log.jsonl, TensorBoard events, a log "
        "of minimind",
    ),
]


def compare(
    *runs: Runs,
    at: Annotated[
        str | None,
        Parameter(
            help="tokens to compare at: 24M; as far as all came where left out", metavar="TOKENS"
        ),
    ] = None,
    output_format: Annotated[
        Literal["auto", "human", "json", "csv", "md", "quiet"],
        Parameter(
            name="--format",
            group=OUTPUT,
            help="auto, human, json, csv, md (Markdown), or quiet: the names on the Pareto set",
        ),
    ] = "auto",
    json: Annotated[bool, Parameter(help="--format json", group=OUTPUT)] = False,
    csv: Annotated[bool, Parameter(help="--format csv", group=OUTPUT)] = False,
    md: Annotated[bool, Parameter(help="--format md", group=OUTPUT)] = False,
) -> None:
    """Compare peak memory, speed and losses of runs at equal tokens.

    Shows differences to the first run with confidence intervals, the settings that differ, and
    whether runs with the same effective batch are numerically the same training.
    """
    if not runs:
        raise UsageError(
            "give the runs to compare, the first being what the others are compared with"
        )
    comparison = compare_runs(
        [run_path(run) for run in runs], tokens=None if at is None else _tokens(at)
    )
    chosen = "json" if json else "csv" if csv else "md" if md else output_format
    if chosen == "json":
        print_json(tables.comparison_json(comparison))
    elif chosen == "csv":
        print_text(tables.csv_text(comparison), end="")
    elif chosen == "md":
        print_text(tables.markdown(comparison), end="")
    elif chosen == "quiet":
        for row in comparison.rows:
            if row.on_front:
                print_text(printable_line(row.name))
    else:
        show_comparison(comparison, console(chosen))


def show_comparison(comparison: Comparison, screen: Screen) -> None:
    heads = tables.columns(comparison)
    rows = [tables.cells(row) for row in comparison.rows]
    without = (
        {tables.TRAIN_COLUMN}
        if all(row.eval_loss is not None for row in comparison.rows)
        else set()
    )
    used = [
        index for index in range(len(heads)) if index not in without and _has_values(rows, index)
    ]
    screen.print(tables.heading(comparison))
    screen.print(
        table([heads[index] for index in used], [[row[index] for index in used] for row in rows])
    )
    if len(rows) > 1:
        screen.print(tables.legend())
    differing = tables.differing_rows(comparison)
    if differing:
        screen.print()
        screen.print(table(["", *(row.name for row in comparison.rows)], differing))
    for message in (*verdicts(comparison), *comparison.notes):
        screen.print(f"· {translated(message)}")


def _has_values(rows: list[list[str]], index: int) -> bool:
    return index == 0 or any(row[index] not in ("", "n/a") for row in rows)


def _tokens(text: str) -> float:
    """Parse a number of tokens: '24M' is 24_000_000. Raises UsageError if it is no number."""
    factors = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "": 1.0}
    digits = text.rstrip("kKMG")
    try:
        return float(digits.replace(",", "")) * factors[text[len(digits) :]]
    except (KeyError, ValueError):
        raise UsageError(
            f"--at '{text}' is no number of tokens: write it like 24M or 500k"
        ) from None
