"""Writes a comparison as a table: for a terminal, Markdown, CSV, JSON and a notebook."""

import csv
import html
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from fitune.language import say, translated
from fitune.report.compare import ComparedRun, Comparison
from fitune.report.verdicts import verdicts
from fitune.run.interval import ConfidenceInterval
from fitune.units import format_count, format_gib

#: the index of the training loss in `columns`: a narrow screen shows the eval loss alone
TRAIN_COLUMN = 5


def columns(comparison: Comparison) -> list[str]:
    """Return the headings. One that starts with '>' marks a column of numbers."""
    return [
        say("run"), say("micro x accum"), say(">lr"), say(">peak GiB"), say(">tok/s"),
        say(">train loss"), say(">eval loss"), say(">to the first"),
    ]  # fmt: skip


def cells(row: ComparedRun) -> list[str]:
    """Return a run's texts for the columns."""
    return [
        f"* {row.name}" if row.on_front else row.name,
        "n/a" if row.effective_batch is None else row.split,
        "n/a" if row.lr is None else f"{row.lr:.2g}",
        peak(row),
        "n/a" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        number(row.train_loss),
        number(row.eval_loss),
        difference(row.eval_difference),
    ]


def peak(row: ComparedRun) -> str:
    """Return the peak of the whole run in GiB: '16.9', or '(16.7)' if it is only predicted."""
    if row.run_peak_bytes is None and row.predicted_bytes is not None:
        return f"({format_gib(row.predicted_bytes)})"
    return format_gib(row.run_peak_bytes)


def number(value: float | None, decimals: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


def difference(interval: ConfidenceInterval | None) -> str:
    """Return a difference with its interval: '-0.041 ±0.004 !'.

    The '!' is there if the difference is more than chance. The interval may be asymmetric; its
    larger side is shown.
    """
    if interval is None:
        return ""
    half = max(interval.high - interval.mean, interval.mean - interval.low)
    return f"{interval.mean:+.3f} ±{half:.3f}{' !' if interval.excludes_zero else ''}"


def heading(comparison: Comparison) -> str:
    if comparison.tokens is None:
        return say("each run at its end")
    return say("at {tokens} tokens", tokens=format_count(comparison.tokens))


def legend() -> str:
    return say(
        "* nothing else is better all round · ! more than chance (95 %, paired over the held-out samples)"
    )


def markdown(comparison: Comparison) -> str:
    heads = columns(comparison)
    rule = ["---:" if head.startswith(">") else "---" for head in heads]
    lines = [
        [head.removeprefix(">") for head in heads],
        rule,
        *(cells(row) for row in comparison.rows),
    ]
    body = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
    sentences = "\n".join(
        f"- {translated(sentence)}" for sentence in [*verdicts(comparison), *comparison.notes]
    )
    return f"{heading(comparison)}\n\n{body}\n\n{legend()}\n\n{sentences}\n"


def csv_text(comparison: Comparison) -> str:
    """Return a line for each run, with all digits, and with the settings that differ.

    Units are in the names of the columns.
    """
    out = io.StringIO()
    rows = [row_json(row) for row in comparison.rows]
    flat: list[dict[str, object]] = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict)}
        for key, value in row.items():
            if isinstance(value, dict):
                line |= {f"{key}_{part}": each for part, each in value.items()}
        flat.append(line)
    names = list(dict.fromkeys(key for row in flat for key in row))
    writer = csv.DictWriter(out, [*names, *comparison.differing], restval="", lineterminator="\n")
    writer.writeheader()
    for index, line in enumerate(flat):
        writer.writerow(line | {key: values[index] for key, values in comparison.differing.items()})
    return out.getvalue()


def comparison_json(comparison: Comparison) -> dict[str, object]:
    return {
        "tokens": comparison.tokens,
        "runs": [row_json(row) for row in comparison.rows],
        "differing": {key: list(values) for key, values in comparison.differing.items()},
        "checks": [asdict(check) | {"same": check.same} for check in comparison.checks],
        "verdicts": verdicts(comparison),
        "notes": list(comparison.notes),
    }


def row_json(row: ComparedRun) -> dict[str, object]:
    names = (
        "effective_batch", "split", "lr", "predicted_bytes", "measured_bytes", "run_peak_bytes",
        "tokens_per_second", "seconds", "train_loss", "eval_loss", "on_front",
    )  # fmt: skip
    intervals = {name: getattr(row, name) for name in ("train_difference", "eval_difference")}
    return {
        "name": row.name,
        "path": row.run.path,
        "origin": row.run.origin,
        "state": row.run.state,
        **{name: _finite(getattr(row, name)) for name in names},
        **{
            name: None if interval is None else asdict(interval)
            for name, interval in intervals.items()
        },
    }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and value - value != 0 else value


def html_table(comparison: Comparison) -> str:
    """Return the table and the verdicts as HTML for a notebook, with all text escaped."""
    heads = columns(comparison)
    table = _table(heads, [cells(row) for row in comparison.rows])
    sentences = "".join(
        f"<li>{html.escape(translated(text))}</li>"
        for text in [*verdicts(comparison), *comparison.notes]
    )
    head, foot = html.escape(heading(comparison)), html.escape(legend())
    return f"<p>{head}</p>{table}<p>{foot}</p><ul>{sentences}</ul>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    right = [head.startswith(">") for head in heads]

    def line(tag: str, texts: Sequence[str]) -> Iterator[str]:
        for text, is_right in zip(texts, right, strict=True):
            align = ' style="text-align:right"' if is_right else ""
            yield f"<{tag}{align}>{html.escape(text)}</{tag}>"

    head = "".join(line("th", [text.removeprefix(">") for text in heads]))
    body = "".join(f"<tr>{''.join(line('td', row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def differing_rows(comparison: Comparison) -> list[list[str]]:
    """Return a row for each setting that differs: its key, and its value in each run as text."""
    return [
        [key, *(show(value) for value in values)] for key, values in comparison.differing.items()
    ]


def show(value: object) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
