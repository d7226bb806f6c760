"""Embeds runs in a report as JSON, and reads them from it again.

embed(run, max_points=...)   the run as JSON
read_report(path)            the runs that a report.html contains
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fitune.boundary import parse_json
from fitune.errors import RunDirectoryError
from fitune.plain_files import read_plain
from fitune.report.run_on_disk import (
    EVAL_COLUMNS,
    MEMORY_COLUMNS,
    TRAIN_COLUMNS,
    Curve,
    RecordedRun,
    to_number,
)
from fitune.report.thin import thin_all
from fitune.run.answers import EvalAnswer
from fitune.run.eval_rows import EvalRows
from fitune.run.metrics import RunEvent

#: the id of the HTML element of a report that contains its runs as JSON
EMBEDDED_ID = "fitune-runs"
#: the most events of a run that a report contains
MAX_EVENTS = 200
#: the most answers of a run that a report contains
MAX_ANSWERS = 200
#: the most characters of a text that a report contains
MAX_CHARS = 300


def embed(run: RecordedRun, *, max_points: int) -> dict[str, object]:
    """Return the run as JSON, for a report that can be compared again.

    It contains curves of at most `max_points`, the samples' losses of the last evaluation, and the
    last events.
    """

    def columns(curve: Curve, *watched: str) -> dict[str, list[float | None]]:
        """Return fewer points of the curve, with the extremes of the `watched` columns."""
        known = [curve[name] for name in watched if np.isfinite(curve[name]).any()]
        rows = thin_all(known or [curve[watched[0]]], max_points)
        thinned = {
            name: column[rows] for name, column in curve.items() if np.isfinite(column).any()
        }
        return {name: [_short(value) for value in column] for name, column in thinned.items()}

    plain = ("name", "path", "origin", "state", "summary", "started")
    return {
        **{name: getattr(run, name) for name in plain},
        "settings": {key: clip(value) for key, value in run.settings.items()},
        "train": columns(run.train, "loss", "peak_reserved_bytes", "device_used_bytes"),
        "evals": columns(run.evals, "eval_loss"),
        "memory": columns(run.memory, "peak_reserved_bytes", "peak_process_bytes"),
        "eval_rows": [
            asdict(rows) | {"losses": [round(loss, 4) for loss in rows.losses]}
            for rows in run.eval_rows[-1:]
        ],
        "answers": [
            asdict(line) | {"prompt": clip(line.prompt), "answer": clip(line.answer)}
            for line in run.answers[-MAX_ANSWERS:]
        ],
        "events": [
            asdict(event) | {"message": clip(event.message)} for event in run.events[-MAX_EVENTS:]
        ],
        "plan": run.plan,
        "env": run.env,
        "data": run.data,
        "peak": run.peak,
        "notes": list(run.notes),
    }


def clip(value: object) -> Any:
    """Cut a text to MAX_CHARS characters.

    Numbers, booleans and None are returned unchanged; any other value is returned as cut text.
    """
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"


def _short(value: float) -> float | None:
    """Return the value with seven digits, or None for nan and infinity, which JSON lacks."""
    return float(f"{value:.7g}") if np.isfinite(value) else None


def thinned(run: RecordedRun, max_points: int) -> RecordedRun:
    """Return the run as a report that contains it would give it back."""
    return _unembed(embed(run, max_points=max_points))


def read_report(path: Path) -> tuple[RecordedRun, ...]:
    """Return the runs that a report of fitune contains.

    Raises RunDirectoryError if there are none.
    """
    finder = _Embedded()
    try:
        finder.feed(read_plain(path, follow=True).decode())
        content = parse_json("".join(finder.parts))
        return tuple(_unembed(each) for each in content["runs"])
    # any exception, because anybody may have written the file
    except Exception as error:
        raise RunDirectoryError(
            f"{path} holds no runs: it is no report of fitune, or a damaged one"
        ) from error


def _unembed(content: Mapping[str, Any]) -> RecordedRun:
    """Return the run that `embed` returned as JSON."""

    def curve(names: Sequence[str], columns: Mapping[str, Sequence[float | None]]) -> Curve:
        length = max(map(len, columns.values()), default=0)
        return {
            name: np.array([to_number(value) for value in columns[name]])
            if name in columns
            else np.full(length, np.nan)
            for name in names
        }

    plain = ("name", "path", "origin", "state", "summary", "settings", "started")
    return RecordedRun(
        **{name: content[name] for name in plain},
        **{name: content[name] for name in ("plan", "env", "data", "peak")},
        train=curve(TRAIN_COLUMNS, content["train"]),
        evals=curve(EVAL_COLUMNS, content["evals"]),
        memory=curve(MEMORY_COLUMNS, content["memory"]),
        eval_rows=tuple(
            EvalRows(
                step=int(rows["step"]),
                total_tokens=int(rows["total_tokens"]),
                losses=tuple(rows["losses"]),
                weights=tuple(rows["weights"]),
            )
            for rows in content["eval_rows"]
        ),
        # reports of earlier versions have none
        answers=tuple(EvalAnswer(**line) for line in content.get("answers", ())),
        events=tuple(RunEvent(**event) for event in content["events"]),
        notes=tuple(content["notes"]),
    )


class _Embedded(HTMLParser):
    """Collects the text of the element EMBEDDED_ID."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script" and dict(attrs).get("id") == EMBEDDED_ID

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.parts.append(data)
