"""Writes a comparison as one HTML file that contains all it needs: tables, data, pictures, scripts.

The page is safe with any data: text from a run is escaped, JSON is embedded with every '<' written
as \\u003c, names are escaped before plotly gets them, and the content security policy allows only
the two scripts of this page, by their hashes, and no requests. The pictures are plotly's JSON,
drawn by its basic bundle (MIT), which this package contains: plotly's own Python package has only
the full bundle, which alone is larger than a page may be.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fitune.boundary import raised_as
from fitune.errors import RunDirectoryError
from fitune.language import choose_language, say, translated
from fitune.language.printable import printable
from fitune.report import tables
from fitune.report.advice import advise
from fitune.report.charts import COLOURS, MAX_POINTS, Picture, Section, Series, pictures
from fitune.report.compare import ComparedRun, Comparison
from fitune.report.embedded import EMBEDDED_ID, MAX_ANSWERS, MAX_EVENTS, clip, embed
from fitune.report.run_on_disk import RecordedRun
from fitune.report.suggestion import Advice
from fitune.report.verdicts import finite_loss, outcome, verdicts
from fitune.run.files import OUTPUT_KEY, write_atomically
from fitune.units import format_bytes, format_count, format_seconds

PLOTLY = "plotly-basic-4.1.1.min.js.gz"
_DASHES = ("solid", "dash", "dashdot", "dot")
_MOST_NAME_CHARS = 40


def write_page(comparison: Comparison, path: Path, *, place: str = OUTPUT_KEY) -> None:
    """Write the page to `path`.

    place: the option with which the user gave the path, for error messages.
    Raises RunDirectoryError if the page cannot be written.
    """
    write_atomically(path, page(comparison), place=place)


def page(comparison: Comparison) -> str:
    """Return the HTML of the page, in the language of `choose_language`.

    Raises RunDirectoryError if the runs' files contain other values than a run writes.
    """
    names = ", ".join(row.run.path for row in comparison.rows)
    with raised_as(
        RunDirectoryError,
        f"what {names} holds cannot be shown",
        "remove the damaged one of data.json, env.json, peak.json and plan.json",
    ):
        return _page(comparison)


def _page(comparison: Comparison) -> str:
    drawn = pictures(comparison)
    runs = [row.run for row in comparison.rows]
    scripts = {name: _script(name) for name in ("plotly", "page")}
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts.values())
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    title = runs[0].name if len(runs) == 1 else say("{num} runs of fitune", num=len(runs))
    data = {
        "schema": 1,
        "runs": [embed(run, max_points=max(MAX_POINTS // len(runs), 60)) for run in runs],
    }
    figures = {
        "words": {"fault": say("a picture could not be drawn")},
        "pictures": [_figure(picture) for picture in drawn],
    }
    return f"""<!DOCTYPE html>
<html lang="{choose_language()}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} - fitune</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">{_text(say("to the content"))}</a>
{_body(comparison, drawn, title=title)}
<p id="fault" role="alert"></p>
<script type="application/json" id="{EMBEDDED_ID}">{_json(data)}</script>
<script type="application/json" id="fitune-figures">{_json(figures)}</script>
<script>{scripts["plotly"]}</script>
<script>{scripts["page"]}</script>
</body>
</html>
"""


def _body(comparison: Comparison, drawn: Sequence[Picture], *, title: str) -> str:
    runs = [row.run for row in comparison.rows]
    best = next(iter(sorted(comparison.rows, key=finite_loss)), None)
    advice = [] if best is None else advise(best.run, comparison)
    losses = _axis_switch(drawn) + _plots(drawn, "loss")
    peak = _plots(drawn, "peak") + _largest(runs)
    table = _comparison(comparison) + _plots(drawn, "comparison")
    return "\n".join(
        [
            f"<header><h1>{_bdi(title)}</h1>{_header(comparison)}</header>",
            _navigation(),
            "<main id='main'>",
            _section("comparison", say("Comparison"), table),
            _section("loss", say("Loss"), losses),
            _section("memory", say("Memory"), _plots(drawn, "memory")),
            _section("peak", say("One step under the microscope"), peak),
            _section("data", say("Data"), _plots(drawn, "data")),
            _section("advice", say("Advice"), _advice(best, advice)),
            _section("answers", say("Answers"), "".join(_answers(run) for run in runs)),
            _section("events", say("Events"), "".join(_events(run) for run in runs)),
            _section("settings", say("Settings"), "".join(_settings(run) for run in runs)),
            "</main>",
        ]
    )


@cache
def _asset(name: str) -> str:
    file = resources.files("fitune.report") / "assets" / name
    return (
        gzip.decompress(file.read_bytes()).decode()
        if name.endswith(".gz")
        else file.read_text(encoding="utf-8")
    )


def _script(name: str) -> str:
    """Return a script without text that would end its element early.

    The text '</script' may be in one of plotly's strings.
    """
    text = _asset(PLOTLY if name == "plotly" else f"{name}.js")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(content: object) -> str:
    text = json.dumps(
        content, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False
    )
    for character, written in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, written)
    return text.encode("utf-8", "replace").decode()


def _text(value: object) -> str:
    """Return the value as escaped text, without control characters and of limited length."""
    return html.escape(printable(str(clip(value))))


def _bdi(value: object) -> str:
    """Return the value in an element that isolates right-to-left text from the text around it."""
    return f"<bdi>{_text(value)}</bdi>"


def _header(comparison: Comparison) -> str:
    if len(comparison.rows) == 1:
        row = comparison.rows[0]
        sentences = [outcome(row)]
        cards = "".join(_card(name, value) for name, value in _facts(row))
    else:
        sentences, cards = verdicts(comparison), ""
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul class='verdict'>{items}</ul><div class='cards'>{cards}</div>"


def _facts(row: ComparedRun) -> Iterator[tuple[str, str]]:
    summary = row.run.summary
    yield say("state"), say(row.run.state)
    yield say("peak memory"), format_bytes(row.run_peak_bytes)
    if row.prediction_error is not None:
        yield (
            say("predicted, for a step"),
            f"{format_bytes(row.predicted_bytes)} ({row.prediction_error:+.1%})",
        )
    yield say("eval loss"), tables.number(row.eval_loss)
    yield say("tokens/s"), format_count(row.tokens_per_second)
    yield say("tokens"), format_count(summary.get("tokens"))
    yield say("time"), format_seconds(summary.get("seconds"))
    yield say("out of memory"), f"{summary.get('num_ooms', 0)}"
    yield say("changes of micro-batch"), f"{summary.get('micro_batch_changes', 0)}"


def _card(name: str, value: str) -> str:
    return f"<div class='card'><span class='soft'>{_text(name)}</span><b>{_text(value)}</b></div>"


def _navigation() -> str:
    names = {
        "comparison": say("Comparison"), "loss": say("Loss"), "memory": say("Memory"),
        "advice": say("Advice"), "events": say("Events"), "settings": say("Settings"),
    }  # fmt: skip
    links = "".join(f"<a href='#{key}'>{_text(name)}</a>" for key, name in names.items())
    return f"<nav>{links}</nav>"


def _section(key: str, title: str, content: str) -> str:
    if not content:
        return ""
    return f"<section aria-labelledby='{key}'><h2 id='{key}'>{_text(title)}</h2>{content}</section>"


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Sequence[bool] = ()
) -> str:
    """Return an HTML table. A heading that starts with '>' marks a column of numbers.

    marked: the rows that are highlighted.
    """
    classes = [" class='number'" if head.startswith(">") else "" for head in heads]
    top = "".join(
        f"<th scope='col'{kind}>{_text(head.removeprefix('>'))}</th>"
        for head, kind in zip(heads, classes, strict=True)
    )
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td{kind}>{_bdi(cell)}</td>" for cell, kind in zip(row, classes, strict=True)
        )
        is_marked = index < len(marked) and marked[index]
        lines.append(f"<tr{' class=front' if is_marked else ''}>{cells}</tr>")
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<div class='wide'><table>{body}</table></div>"


def _comparison(comparison: Comparison) -> str:
    heads = tables.columns(comparison)
    rows = [tables.cells(row) for row in comparison.rows]
    parts = [
        f"<p class='soft'>{_text(tables.heading(comparison))}</p>",
        _table(heads, rows, marked=[row.on_front for row in comparison.rows]),
    ]
    if len(rows) > 1:
        parts.append(f"<p class='soft'>{_text(tables.legend())}</p>")
    differing = tables.differing_rows(comparison)
    if differing:
        parts.append(f"<h3>{_text(say('Settings that differ'))}</h3>")
        parts.append(_table([say("key"), *(row.name for row in comparison.rows)], differing))
    if comparison.notes:
        notes = "".join(f"<li>{_text(translated(note))}</li>" for note in comparison.notes)
        parts.append(f"<ul>{notes}</ul>")
    return "".join(parts)


def _axis_switch(drawn: Sequence[Picture]) -> str:
    """Return radio buttons for the horizontal axis of the losses, if there are several axes."""
    picture = next((picture for picture in drawn if picture.key == "loss"), None)
    if picture is None or len(picture.axes) < 2:
        return ""
    first = next(iter(picture.axes))
    inputs = "".join(
        f"<label><input type='radio' name='axis' value='{axis}'{checked}> {_text(title)}</label>"
        for axis, title in picture.axes.items()
        for checked in (" checked" if axis == first else "",)
    )
    return f"<fieldset><legend>{_text(say('by'))}</legend>{inputs}</fieldset>"


def _plots(drawn: Sequence[Picture], section: Section) -> str:
    return "".join(
        f"<h3>{_text(picture.title)}</h3>"
        f"<div class='plot' id='{_plot_id(picture)}' role='img' tabindex='0' "
        f"aria-label='{_text(picture.says)}'></div>"
        for picture in drawn
        if picture.section == section
    )


def _plot_id(picture: Picture) -> str:
    """Return an id of letters and digits, whatever the name of the run."""
    return f"plot-{hashlib.sha256(picture.key.encode('utf-8', 'replace')).hexdigest()[:12]}"


def _largest(runs: Sequence[RecordedRun]) -> str:
    """Return tables of the largest modules and tensors that are live at the predicted peak."""
    parts = []
    for run in runs:
        for key, title in (
            ("modules", say("largest modules")),
            ("tensors", say("largest tensors")),
        ):
            found = (run.peak or {}).get(key)
            rows = [
                [str(each.get("name") or each.get("op") or "n/a"), str(each.get("op") or ""),
                 str(each.get("category") or ""), format_bytes(each.get("num_bytes"))]
                for each in (found if isinstance(found, list) else [])
                if isinstance(each, dict)
            ]  # fmt: skip
            if rows:
                heads = [title, say("made by"), say("category"), say(">size")]
                summary = f"<summary>{_bdi(run.name)}: {_text(title)}</summary>"
                parts.append(f"<details>{summary}{_table(heads, rows)}</details>")
    return "".join(parts)


def _advice(row: ComparedRun | None, advice: Sequence[Advice]) -> str:
    if row is None:
        return ""
    if not advice:
        nothing = say("nothing to change in {name}, as far as its record tells", name=row.name)
        return f"<p>{_text(nothing)}</p>"
    rows = [[each.change, each.memory, each.speed, each.effect, each.evidence] for each in advice]
    heads = [say("change"), say(">memory"), say(">speed"), say("training result"), say("evidence")]
    commands = "\n".join(_text(each.command) for each in advice if each.command)
    whose = f"<p class='soft'>{_text(say('for {name}', name=row.name))}</p>"
    return f"{whose}{_table(heads, rows)}<pre>{commands}</pre>"


def _answers(run: RecordedRun) -> str:
    """Return a table of the answers to each prompt: one row for each evaluation."""
    parts = []
    for prompt in dict.fromkeys(line.prompt for line in run.answers):
        rows = [
            [f"{line.step:,}", f"{line.num_tokens:,}", line.answer]
            for line in run.answers[-MAX_ANSWERS:]
            if line.prompt == prompt
        ]
        heads = [say(">step"), say(">tokens"), say("answer")]
        summary = f"<summary>{_bdi(run.name)}: {_bdi(prompt)}</summary>"
        parts.append(f"<details open>{summary}{_table(heads, rows)}</details>")
    return "".join(parts)


def _events(run: RecordedRun) -> str:
    if not run.events:
        return ""
    start = run.events[0].time
    rows = [
        [
            format_seconds(max(event.time - start, 0.0)),
            f"{event.step:,}",
            say(event.kind),
            translated(event.message),
        ]
        for event in run.events[-MAX_EVENTS:]
    ]
    heads = [say(">after"), say(">step"), say("kind"), say("what")]
    summary = f"<summary>{_bdi(run.name)} ({len(run.events):,})</summary>"
    return f"<details open>{summary}{_table(heads, rows)}</details>"


def _settings(run: RecordedRun) -> str:
    rows = [[key, tables.show(value)] for key, value in run.settings.items()]
    machine = ", ".join(str(clip(value)) for value in _machine(run))
    command = f"fitune train {run.path}/config.yaml" if run.origin == "fitune" else ""
    again = f"<p>{_text(say('to do it again'))}</p><pre>{_text(command)}</pre>" if command else ""
    about = f"<p class='soft'>{_text(machine)}</p>" if machine else ""
    table = _table([say("key"), say("value")], rows) if rows else ""
    return f"<details><summary>{_bdi(run.name)}</summary>{about}{again}{table}</details>"


def _machine(run: RecordedRun) -> Iterator[str]:
    """Yield the versions and devices that env.json contains."""
    env = run.env or {}
    yield from (f"{key} {env[key]}" for key in ("fitune", "python", "driver") if env.get(key))
    if env.get("system"):
        yield str(env["system"])
    packages = env.get("packages")
    if isinstance(packages, dict):
        yield from (f"{name} {version}" for name, version in packages.items() if version)
    for device in (*(env.get("cards") or ()), env.get("cpu")):
        if isinstance(device, dict) and device.get("name"):
            yield str(device["name"])


def _figure(picture: Picture) -> dict[str, object]:
    """Return the picture as plotly takes it, with escaped names and numbers of six digits."""
    first = next(iter(picture.axes))
    layout: dict[str, object] = {
        "xaxis": {"title": {"text": _text(picture.axes[first])}, "automargin": True},
        "yaxis": {"title": {"text": _text(picture.y_title)}, "automargin": True,
                  "rangemode": "tozero" if picture.from_zero else "normal", "exponentformat": "e"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#0072B2"},
        # without the top margin the mode bar would cover the label of a line
        "margin": {"l": 60, "r": 20, "t": 34, "b": 50},
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0},
        "showlegend": any(series.name for series in picture.series),
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y,
             "line": {"dash": "dot", "width": 1.5, "color": "#888888"}}
            for _, y in picture.lines
        ],
        "annotations": [
            {"text": f"{_text(label)} {y:.1f}", "xref": "paper", "x": 1, "y": y, "xanchor": "right",
             "yanchor": "bottom", "showarrow": False}
            for label, y in picture.lines
        ],
    }  # fmt: skip
    switchable = picture.series if len(picture.axes) > 1 else ()
    return {
        "id": _plot_id(picture),
        "axes": {axis: _text(title) for axis, title in picture.axes.items()},
        "xs": [{axis: _numbers(series.x[axis]) for axis in picture.axes} for series in switchable],
        "data": [_trace(series, first) for series in picture.series],
        "layout": layout,
    }


def _trace(series: Series, axis: str) -> dict[str, object]:
    colour = COLOURS[series.colour % len(COLOURS)]
    is_short = len(series.name) <= _MOST_NAME_CHARS
    trace: dict[str, object] = {
        "type": "scatter",
        "name": _text(series.name if is_short else f"{series.name[:_MOST_NAME_CHARS]}…"),
        "x": _numbers(series.x[axis]),
        "y": _numbers(series.y),
    }
    if series.labels:
        trace |= {"text": [_text(label) for label in series.labels], "hoverinfo": "text"}
    match series.kind:
        case "bars":
            trace |= {"type": "bar", "marker": {"color": colour}}
        case "area":
            trace |= {
                "mode": "lines",
                "stackgroup": "memory",
                "line": {"width": 0, "color": colour},
                "fillcolor": colour,
            }
        case "marks":
            trace |= {
                "mode": "markers",
                "marker": {"symbol": "diamond", "size": 8, "color": colour},
            }
        case "points":
            size = 14 + 26 * float(series.sizes[0] if series.sizes is not None else 0)
            trace |= {"mode": "markers", "marker": {"size": size, "color": colour, "opacity": 0.85}}
        case "faint":
            trace |= {
                "mode": "lines",
                "opacity": 0.3,
                "line": {"width": 1, "color": colour},
                "showlegend": False,
            }
        case _:
            dash = _DASHES[series.dash % len(_DASHES)]
            trace |= {"mode": "lines", "line": {"width": 2, "color": colour, "dash": dash}}
    return trace


def _numbers(values: Any) -> list[object]:
    """Return the values with six digits; text is escaped.

    A value that is not finite becomes null, which leaves a gap in the picture.
    """

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if np.isfinite(value) else None

    return [_text(value) if isinstance(value, str) else number(value) for value in values]
