"""Writes docs/rehearsal.json and the table of docs/rehearsal.md from the rows that `rehearsal.compare` has kept. Rows
that were not made in this checkout stay as they are in docs/rehearsal.json.

    python -m rehearsal.table
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rehearsal.cases import BY_NAME, CARDS, CASES, StepCase
from rehearsal.rows import KEPT, ROOT, ComparedRow, read_rows, replace_section, row_from

RESULTS = ROOT / "docs" / "rehearsal.json"
PAGE = ROOT / "docs" / "rehearsal.md"
BEGIN, END = "<!-- rehearsal.table: begin -->", "<!-- rehearsal.table: end -->"
MOST_EXPLAINED = 4
"""Lines of an explanation that are published."""


def published(path: Path = RESULTS) -> list[ComparedRow]:
    return [row_from(fields) for fields in json.loads(path.read_text())] if path.exists() else []


def merged(old: Iterable[ComparedRow], new: Iterable[ComparedRow]) -> list[ComparedRow]:
    """The new rows in the place of the old ones, in the order of the cases; what is no case any more is left out."""
    rows = {row.key: row for row in (*old, *new)}
    order = [(case.name, card) for case in CASES for card in CARDS]
    return [rows[key] for key in order if key in rows]


def table(rows: Sequence[ComparedRow]) -> list[str]:
    return [
        *summary(rows),
        "",
        "| case | card | setting | allocated predicted | measured | error | reserved predicted | measured | error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *map(_line, rows),
        "",
        *(
            f"- {row.name} on {row.card} was not measured: {row.failure}"
            for row in rows
            if row.failure
        ),
        *(_bounds(row) for row in rows if row.depends_on_data and not row.failure),
    ]


def summary(rows: Sequence[ComparedRow]) -> list[str]:
    """Errors of fitune's own step and of other loops; rows that depend on data are only bounded."""
    exact = [row for row in rows if not row.failure and not row.depends_on_data]
    lines = [
        f"{len(rows)} rows, {len(rows) - len(exact)} of them failed or depending on data. "
        + _software(rows),
        "",
    ]
    for title, own in (("fitune's own step", True), ("other loops and Trainers", False)):
        group = [row for row in exact if isinstance(BY_NAME[row.name], StepCase) == own]
        for metric in ("allocated", "reserved"):
            errors = [abs(row.error_fraction(metric) or 0.0) for row in group]
            if errors:
                zero = sum(error == 0 for error in errors)
                lines.append(
                    f"- {title}, {metric}: {zero} of {len(errors)} to the byte, median error "
                    f"{statistics.median(errors):.3%}, worst {max(errors):.3%}"
                )
    return lines


def _software(rows: Sequence[ComparedRow]) -> str:
    return f"Measured with {'; '.join(sorted({row.versions for row in rows}))}."


def _line(row: ComparedRow) -> str:
    cells = []
    for metric in ("allocated", "reserved"):
        error, fraction = row.error_bytes(metric), row.error_fraction(metric)
        if error is None or fraction is None:
            cells += ["n/a", "n/a", "n/a"]
            continue
        predicted, measured = (
            getattr(row, f"{side}_{metric}_bytes") for side in ("predicted", "measured")
        )
        cells += [
            f"{predicted:,}",
            f"{measured:,}",
            "0" if error == 0 else f"{error:+,} ({fraction:+.3%})",
        ]
    name = f"{row.name} (depends on data)" if row.depends_on_data else row.name
    return f"| {name} | {row.card} | {row.setting} | {' | '.join(cells)} |"


def _bounds(row: ComparedRow) -> str:
    low, high, measured = (
        row.low_allocated_bytes,
        row.high_allocated_bytes,
        row.measured_allocated_bytes,
    )
    where = (
        "inside"
        if low is not None and high is not None and low <= (measured or 0) <= high
        else "outside"
    )
    return (
        f"- {row.name} on {row.card} depends on data: {row.depends_on_data}, and no kernel computes it here. Allocated "
        f"is predicted between {low or 0:,} (tokens spread evenly) and {high or 0:,} (all at the same experts); what "
        f"is measured lies {where}."
    )


def write(rows: Sequence[ComparedRow], *, results: Path = RESULTS, page: Path = PAGE) -> None:
    kept = [
        asdict(replace(row, explained=row.explained[:MOST_EXPLAINED], seconds=0.0)) for row in rows
    ]
    results.write_text(json.dumps(kept, indent=1) + "\n")
    replace_section(page, BEGIN, END, table(rows))


def main() -> None:
    rows = merged(published(), read_rows(KEPT))
    write(rows)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
