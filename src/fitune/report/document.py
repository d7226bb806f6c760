"""Describes the page of a comparison as JSON, which the scripts of `board/assets` draw.

The board sends it to the browser, and a report contains it. All text is in the chosen language and
without control characters, and is shown as text: nothing in it is markup. Its parts:

    title, runs        the runs, in the order of their colours
    verdict, cards     what the comparison shows: sentences, and the numbers that matter most
    charts             key -> a picture, with its series by key
    sections           key -> a title, and blocks: tables, lists, texts, commands, details

Dictionaries have no null in them, so that changes can be sent as a JSON merge patch (RFC 7386).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from fitune.boundary import raised_as
from fitune.errors import RunDirectoryError
from fitune.language import say, translated
from fitune.language.printable import printable
from fitune.report import tables
from fitune.report.advice import advise
from fitune.report.charts import Picture, RunSeries, Series, pictures
from fitune.report.compare import ComparedRun, Comparison, eval_interval
from fitune.report.embedded import MAX_ANSWERS, MAX_EVENTS, clip
from fitune.report.run_on_disk import RecordedRun
from fitune.report.verdicts import finite_loss, outcome, verdicts, winner
from fitune.run.metrics import RunEvent
from fitune.units import format_bytes, format_count, format_seconds

Json = dict[str, object]
Numbers = npt.NDArray[np.float64]
Write = Callable[[Sequence[object] | Numbers], list[object]]
#: events of running out of memory, and of what was done about it
MEMORY_EVENTS = ("out_of_memory", "retry", "micro_batch", "fallback", "quarantine", "spill")
#: the most sentences of a verdict
MOST_SENTENCES = 20
_MOST_NAME_CHARS = 60
_CARD_EVENTS = {"out_of_memory", "not_finite", "loss_spike", "save_failed"}


#: an array -> its numbers as they were written; by id, because arrays have no hash
WrittenArrays = dict[int, tuple[object, list[object]]]


def page_content(comparison: Comparison) -> Json:
    """Return the page of a comparison.

    Raises RunDirectoryError if the runs' files contain other values than a run writes.
    """
    with _readable(comparison):
        return {**page_text(comparison), "charts": page_charts(comparison)}


def page_text(comparison: Comparison) -> Json:
    """Return the page without its charts."""
    with _readable(comparison):
        return {**head(comparison), "sections": dict(_sections(comparison))}


def page_charts(
    comparison: Comparison,
    drawn: Mapping[str, RunSeries] | None = None,
    written: WrittenArrays | None = None,
) -> Json:
    """Return the charts of the page.

    drawn: what `charts.run_series` returned, for the path of each run; None to compute it.
    written: the arrays of the charts before, which are not converted again; it is updated.
    """
    before = {} if written is None else dict(written)
    after: WrittenArrays = {}

    def write(values: Sequence[object] | Numbers) -> list[object]:
        known = before.get(id(values))
        found = known[1] if known is not None and known[0] is values else _values(values)
        after[id(values)] = (values, found)
        return found

    with _readable(comparison):
        found: Json = {
            _text(picture.key): _chart(picture, write) for picture in pictures(comparison, drawn)
        }
    if written is not None:
        written.clear()
        written.update(after)
    return found


def _readable(comparison: Comparison) -> AbstractContextManager[None]:
    names = ", ".join(row.run.path for row in comparison.rows)
    return raised_as(
        RunDirectoryError,
        f"what {names} holds cannot be shown",
        "remove the damaged one of data.json, env.json, peak.json and plan.json",
    )


def head(comparison: Comparison) -> Json:
    """Return the title, the runs, the verdict and the cards."""
    rows = comparison.rows
    runs = [
        {"name": _name(row.name), "state": row.run.state, "state_text": say(row.run.state)}
        for row in rows
    ]
    if len(rows) == 1:
        title, sentences, cards = rows[0].name, [outcome(rows[0])], _facts(rows[0])
    else:
        title = say("{num} runs", num=len(rows))
        sentences, cards = verdicts(comparison), _winner(comparison)
    # pairs of many runs make more sentences than anybody reads
    if num_more := len(sentences[MOST_SENTENCES:]):
        more = say("and {num} more, which fitune compare lists", num=num_more)
        sentences = [*sentences[:MOST_SENTENCES], more]
    return {
        "title": _name(title),
        "runs": runs,
        "verdict": [_text(sentence) for sentence in sentences],
        "cards": [
            {"name": _text(name), "value": _text(value), "note": _text(note)}
            for name, value, note in cards
        ],
    }


def _facts(row: ComparedRun) -> Iterator[tuple[str, str, str]]:
    """Yield the cards of one run: name, value, note."""
    run, summary = row.run, row.run.summary
    done = run.progress_fraction
    share = f" {done:.0%}" if run.state == "running" and done is not None else ""
    left = (
        ""
        if run.seconds_left is None
        else say("{time} left", time=format_seconds(run.seconds_left))
    )
    yield say("state"), f"{say(run.state)}{share}", left
    evals = run.evals["eval_loss"][np.isfinite(run.evals["eval_loss"])]
    yield (
        say("eval loss"),
        tables.number(row.eval_loss),
        say("from {loss}", loss=tables.number(float(evals[0]))) if len(evals) > 1 else "",
    )
    yield say("training loss"), tables.number(row.train_loss), say("mean of the last third")
    budget = (run.plan or {}).get("budget_bytes")
    yield (
        say("peak memory"),
        format_bytes(row.run_peak_bytes),
        say("of {budget}", budget=format_bytes(budget)) if budget else "",
    )
    if row.prediction_error is not None:
        yield (
            say("predicted, for a step"),
            format_bytes(row.predicted_bytes),
            say("{error} against what was measured", error=f"{row.prediction_error:+.1%}"),
        )
    yield say("speed"), format_count(row.tokens_per_second), say("tokens/s")
    tokens = run.total_tokens if np.isfinite(run.total_tokens) else summary.get("tokens")
    yield (
        say("tokens"),
        format_count(tokens),
        say("in {time}", time=format_seconds(summary.get("seconds"))),
    )
    num_ooms = summary.get("num_ooms") or 0
    changes = summary.get("micro_batch_changes") or 0
    yield (
        say("out of memory"),
        say("{num} times", num=num_ooms),
        say("{num} changes of micro-batch", num=changes),
    )


def _winner(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Yield the cards of several runs: which is best, by how much, and what it takes."""
    if found := winner(comparison):
        best, other = found
        yield say("lowest eval loss"), best.name, tables.number(best.eval_loss, 4)
        interval = eval_interval(comparison, best.name, other.name)
        if interval is not None:
            bounds = {"low": f"{interval.low:+.4f}", "high": f"{interval.high:+.4f}"}
            yield (
                say("to {name}", name=other.name),
                f"{interval.mean:+.4f}",
                say("95 %: {low} to {high}", **bounds)
                if interval.excludes_zero
                else say("95 %: {low} to {high}, within chance", **bounds),
            )
    rows = comparison.rows
    if known := [row for row in rows if row.tokens_per_second]:
        fastest = max(known, key=lambda row: row.tokens_per_second or 0.0)
        speed = say("{speed} tokens/s", speed=format_count(fastest.tokens_per_second))
        yield say("fastest"), fastest.name, speed
    if known := [row for row in rows if row.peak_bytes]:
        leanest = min(known, key=lambda row: row.peak_bytes or 0)
        yield say("least memory"), leanest.name, format_bytes(leanest.peak_bytes)
    if comparison.tokens is not None:
        yield (
            say("compared at"),
            format_count(comparison.tokens),
            say("tokens, which all have reached"),
        )
    if running := [row.name for row in rows if row.run.state == "running"]:
        yield say("running"), f"{len(running)}", ", ".join(running)


def _sections(comparison: Comparison) -> Iterator[tuple[str, Json]]:
    """Yield the sections below the charts, without those that have no content."""
    runs = [row.run for row in comparison.rows]
    best = next(iter(sorted(comparison.rows, key=finite_loss)), None)
    for key, title, blocks in (
        ("comparison", say("Comparison"), _comparison(comparison)),
        ("memory", say("Out of memory, and what was done"), _memory_events(runs)),
        ("advice", say("Advice"), _advice(best, comparison)),
        ("answers", say("Answers"), [block for run in runs for block in _answers(run)]),
        ("events", say("Events"), [block for run in runs for block in _events(run)]),
        ("peak", say("Alive at the peak"), [block for run in runs for block in _largest(run)]),
        ("settings", say("Settings"), [_settings(run) for run in runs]),
    ):
        if found := list(blocks):
            yield key, {"title": title, "blocks": found}


def _comparison(comparison: Comparison) -> Iterator[Json]:
    yield {"kind": "text", "text": _text(tables.heading(comparison))}
    yield _table(
        tables.columns(comparison),
        [tables.cells(row) for row in comparison.rows],
        marked=[row.on_front for row in comparison.rows],
    )
    if len(comparison.rows) > 1:
        yield {"kind": "text", "text": _text(tables.legend())}
    if notes := [_text(translated(note)) for note in comparison.notes]:
        yield {"kind": "list", "items": notes}
    if differing := tables.differing_rows(comparison):
        heads = [say("key"), *(row.name for row in comparison.rows)]
        yield _details(say("Settings that differ"), [_table(heads, differing)], is_open=True)


def _memory_events(runs: Sequence[RecordedRun]) -> Iterator[Json]:
    for run in runs:
        found = [event for event in run.events if event.kind in MEMORY_EVENTS]
        if any(event.kind == "out_of_memory" for event in found):
            yield {"kind": "text", "text": _name(run.name)}
            yield _event_table(run, found)


def _events(run: RecordedRun) -> Iterator[Json]:
    if run.events:
        title = f"{_name(run.name)} ({len(run.events):,})"
        yield _details(title, [_event_table(run, run.events)], is_open=True)


def _event_table(run: RecordedRun, events: Sequence[RunEvent]) -> Json:
    start = run.events[0].time
    rows = [
        [
            format_seconds(max(event.time - start, 0.0)),
            f"{event.step:,}",
            say(event.kind),
            translated(event.message),
        ]
        for event in events[-MAX_EVENTS:]
    ]
    marked = [
        event.kind in _CARD_EVENTS or event.message.startswith("warning")
        for event in events[-MAX_EVENTS:]
    ]
    return _table([say(">after"), say(">step"), say("kind"), say("what")], rows, marked=marked)


def _advice(row: ComparedRun | None, comparison: Comparison) -> Iterator[Json]:
    if row is None:
        return
    advice = advise(row.run, comparison)
    if not advice:
        nothing = say("nothing to change in {name}, as far as its record tells", name=row.name)
        yield {"kind": "text", "text": _text(nothing)}
        return
    yield {"kind": "text", "text": _text(say("for {name}", name=row.name))}
    rows = [[each.change, each.memory, each.speed, each.effect, each.evidence] for each in advice]
    heads = [say("change"), say(">memory"), say(">speed"), say("training result"), say("evidence")]
    yield _table(heads, rows)
    yield {
        "kind": "code",
        "text": "\n".join(_text(each.command) for each in advice if each.command),
    }


def _answers(run: RecordedRun) -> Iterator[Json]:
    """Yield a table of the answers to each prompt: one row for each evaluation."""
    for prompt in dict.fromkeys(line.prompt for line in run.answers):
        rows = [
            [f"{line.step:,}", f"{line.num_tokens:,}", line.answer]
            for line in run.answers[-MAX_ANSWERS:]
            if line.prompt == prompt
        ]
        table = _table([say(">step"), say(">tokens"), say("answer")], rows)
        yield _details(f"{_name(run.name)}: {_text(prompt)}", [table], is_open=True)


def _largest(run: RecordedRun) -> Iterator[Json]:
    """Yield a table of the largest modules that are alive at the predicted peak."""
    found = (run.peak or {}).get("modules")
    rows = [
        [str(each.get("name") or "n/a"), str(each.get("category") or ""),
         format_bytes(each.get("num_bytes"))]
        for each in (found if isinstance(found, list) else [])
        if isinstance(each, dict)
    ]  # fmt: skip
    if rows:
        table = _table([say("largest modules"), say("category"), say(">size")], rows)
        phase = str((run.peak or {}).get("peak_phase") or "n/a")
        title = say("{name}, in {phase}", name=_name(run.name), phase=phase)
        yield _details(title, [table], is_open=False)


def _settings(run: RecordedRun) -> Json:
    blocks: list[Json] = []
    if machine := ", ".join(str(clip(value)) for value in _machine(run)):
        blocks.append({"kind": "text", "text": _text(machine)})
    if run.origin == "fitune":
        blocks.append({"kind": "text", "text": say("to do it again")})
        blocks.append({"kind": "code", "text": _text(f"fitune train {run.path}/config.yaml")})
    if rows := [[key, tables.show(value)] for key, value in run.settings.items()]:
        blocks.append(_table([say("key"), say("value")], rows))
    return _details(_name(run.name), blocks, is_open=False)


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


def _details(summary: str, blocks: Sequence[Json], *, is_open: bool) -> Json:
    return {"kind": "details", "summary": _text(summary), "blocks": blocks, "open": is_open}


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Sequence[bool] = ()
) -> Json:
    """Return a table. A heading that starts with '>' marks a column of numbers.

    marked: the rows that are highlighted.
    """
    return {
        "kind": "table",
        "heads": [_name(head.removeprefix(">")) for head in heads],
        "numbers": [head.startswith(">") for head in heads],
        "rows": [[_text(cell) for cell in row] for row in rows],
        "marked": [index for index, is_marked in enumerate(marked) if is_marked],
    }


def _chart(picture: Picture, write: Write) -> Json:
    return {
        "title": _text(picture.title),
        "note": _text(picture.note),
        "says": _text(picture.says),
        "axes": {axis: _text(title) for axis, title in picture.axes.items()},
        "y_title": _text(picture.y_title),
        "from_zero": picture.from_zero,
        "lines": [{"name": _name(name), "y": _numbers([y])[0]} for name, y in picture.lines],
        "series": {
            f"{index}": _series(series, picture, write)
            for index, series in enumerate(picture.series)
        },
    }


def _series(series: Series, picture: Picture, write: Write) -> Json:
    found: Json = {
        "name": _name(series.name),
        "kind": series.kind,
        "colour": series.colour,
        "dash": series.dash,
        "x": {axis: write(series.x[axis]) for axis in picture.axes},
        "y": write(series.y),
    }
    if series.run is not None:
        found["run"] = series.run
    if series.labels:
        found["labels"] = [_text(label) for label in series.labels]
    if series.kind == "points":
        found["size"] = series.size
    if series.kind == "interval":
        found["low"], found["high"] = _numbers([series.low, series.high])
    return found


def _values(values: Sequence[object] | Numbers) -> list[object]:
    if isinstance(values, list) and values and isinstance(values[0], str):
        return [_name(value) for value in values]
    return _numbers(values)


def _numbers(values: object) -> list[object]:
    """Return the values with six digits; what is not finite becomes None, which leaves a gap."""
    column = np.asarray(values, dtype=np.float64)
    is_known = np.isfinite(column)
    known = column[is_known]
    sizes = np.floor(np.log10(np.abs(known), out=np.zeros_like(known), where=known != 0))
    # dividing by a power of ten is exact to the last digit, multiplying by its inverse is not
    exponents = np.clip(5 - sizes, -300, 300)
    scale = 10.0 ** np.abs(exponents)
    rounded = np.where(
        exponents >= 0, np.round(known * scale) / scale, np.round(known / scale) * scale
    )
    found = np.full(len(column), None, dtype=object)
    found[is_known] = rounded
    return found.tolist()


def _name(value: str) -> str:
    """Return a name as text of limited length."""
    text = _text(value)
    return text if len(text) <= _MOST_NAME_CHARS else f"{text[:_MOST_NAME_CHARS]}…"


def _text(value: object) -> str:
    """Return the value as text without control characters and of limited length."""
    return printable(str(clip(value)))
