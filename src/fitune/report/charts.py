"""Describes the pictures of a comparison as data: series with their axes.

The page draws a Picture with plotly (`board/assets/charts.js`), `png.py` with matplotlib. The
colours are the eight of Okabe and Ito, which are distinguishable with any kind of colour blindness;
runs differ in their dashes too. A picture has about MAX_POINTS points over all runs, and thinning
keeps every extreme.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fitune.language import say, translated
from fitune.report.compare import Comparison
from fitune.report.run_on_disk import Curve, RecordedRun
from fitune.report.thin import thin, thin_all
from fitune.units import GIB, format_count

Kind = Literal["line", "marked line", "faint", "area", "marks", "bars", "points", "interval"]
Numbers = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
MAX_POINTS = 4000
#: of one run in one chart: about two for each pixel of its usual width
MOST_RUN_POINTS = 500
FEWEST_RUN_POINTS = 30
MOST_TIMELINES = 4
MOST_TIMELINE_POINTS = 1600
#: of more runs than these, single steps are not drawn behind their moving average
MOST_FAINT = 8
#: the half-life of a moving average as a fraction of the run
SMOOTHED_FRACTION = 0.03


@dataclass(frozen=True, slots=True)
class Series:
    """A line, area, group of bars or group of points in a picture."""

    name: str
    #: the values for each axis of the picture; text is allowed on an axis 'x'
    x: Mapping[str, Sequence[Any] | Numbers]
    y: Numbers
    kind: Kind = "line"
    #: which run of the comparison it shows; None if it shows a part of one
    run: int | None = None
    #: an index into COLOURS
    colour: int = 0
    #: the number of the line's dash pattern
    dash: int = 0
    #: of a point, between 0 and 1
    size: float = 0.0
    #: a text for each point
    labels: tuple[str, ...] = ()
    #: the ends of an interval
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a comparison."""

    #: the name of the picture in the page and of its file
    key: str
    title: str
    #: the horizontal axes: name -> title
    axes: Mapping[str, str]
    y_title: str
    series: tuple[Series, ...]
    #: (label, y) of horizontal lines
    lines: tuple[tuple[str, float], ...] = ()
    #: whether the vertical axis begins at zero, as for bytes and counts
    from_zero: bool = False
    #: how to read the picture, if its title does not tell
    note: str = ""
    #: what the picture shows, as text for users who cannot see it
    says: str = field(default="")


@dataclass(frozen=True, slots=True)
class CurveChart:
    """A chart of one column of the metrics: a line for each run."""

    column: str
    title: str
    y_title: str
    #: the column's values are multiplied by this
    scale: float = 1.0
    #: whether the values are drawn faintly, under their moving average
    is_smoothed: bool = False
    from_zero: bool = False
    #: the column is one of the evaluations
    of_evals: bool = False
    note: str = ""


#: of one run: the key of a chart -> what the run draws in it
RunSeries = Mapping[str, tuple[Series, ...]]


def _curve_charts() -> dict[str, CurveChart]:
    """Return the charts that overlay the runs, by their key, in the order of the page."""
    nats, gib = say("nats per token"), 1 / GIB
    return {
        "loss": CurveChart("loss", say("Training loss"), nats, is_smoothed=True),
        "eval_loss": CurveChart("eval_loss", say("Evaluation loss"), nats, of_evals=True),
        "lr": CurveChart("lr", say("Learning rate"), say("learning rate"), from_zero=True),
        "grad_norm": CurveChart(
            "grad_norm", say("Gradient norm before clipping"), say("norm"), is_smoothed=True
        ),
        "tokens_per_second": CurveChart(
            "tokens_per_second", say("Speed"), say("tokens/s"), is_smoothed=True, from_zero=True
        ),
        "step_memory": CurveChart(
            "", say("Peak memory of each step"), "GiB", scale=gib, from_zero=True
        ),
        "noise": CurveChart(
            "noise_scale_tokens",
            say("Noise scale of the gradient"),
            say("tokens a step"),
            note=say("the batch beyond which more samples a step stop paying"),
        ),
        "margin": CurveChart("margin", say("Margin of a pair"), say("reward"), is_smoothed=True),
        "pair_accuracy": CurveChart(
            "pair_accuracy", say("Chosen answers preferred"), say("share"), is_smoothed=True
        ),
    }


def run_series(run: RecordedRun, num_runs: int) -> RunSeries:
    """Return what a run draws in the charts that overlay the runs.

    num_runs: how many runs share a chart; each gets fewer points where there are many.
    """
    share = max(min(MAX_POINTS // num_runs, MOST_RUN_POINTS), FEWEST_RUN_POINTS)
    found = {}
    for key, chart in _curve_charts().items():
        column = chart.column or _peak_column(run)
        curve = run.evals if chart.of_evals else run.train
        if np.isfinite(curve[column]).any():
            values = curve[column] * chart.scale
            is_faint = chart.is_smoothed and num_runs <= MOST_FAINT
            found[key] = tuple(_lines(run.name, curve, values, chart, share, is_faint))
    return found


def _lines(
    name: str, curve: Curve, values: Numbers, chart: CurveChart, share: int, is_faint: bool
) -> Iterator[Series]:
    rows = thin(values, share)
    axes = {
        "step": curve["step"][rows],
        "tokens": curve["total_tokens"][rows],
        "hours": curve["seconds"][rows] / 3600,
    }
    if not chart.is_smoothed:
        yield Series(name, axes, values[rows], "marked line" if chart.of_evals else "line")
        return
    if is_faint:
        yield Series(name, axes, values[rows], "faint")
    yield Series(name, axes, smoothed(values)[rows], "line")


def _peak_column(run: RecordedRun) -> str:
    """Return the column with the most memory that the run recorded for each step."""
    names = ("device_used_bytes", "peak_reserved_bytes", "peak_allocated_bytes")
    return next((name for name in names if np.isfinite(run.train[name]).any()), names[0])


def pictures(comparison: Comparison, drawn: Mapping[str, RunSeries] | None = None) -> list[Picture]:
    """Return the pictures for which there is data, in the order of the page.

    drawn: what `run_series` returned, for the path of each run; None to compute it.
    """
    runs = [row.run for row in comparison.rows]
    if drawn is None:
        drawn = {run.path: run_series(run, len(runs)) for run in runs}
    charts = {
        key: _curve_picture(key, chart, comparison, drawn) for key, chart in _curve_charts().items()
    }
    found = [
        charts.pop("loss"),
        charts.pop("eval_loss"),
        interval_picture(comparison),
        *charts.values(),
        pareto_picture(comparison),
        *(memory_picture(run) for run in runs[:MOST_TIMELINES]),
        lengths_picture(runs),
    ]
    return [picture for picture in found if picture is not None and picture.series]


def _curve_picture(
    key: str, chart: CurveChart, comparison: Comparison, drawn: Mapping[str, RunSeries]
) -> Picture:
    series = [
        replace(each, name=row.name, run=index, colour=index, dash=index)
        for index, row in enumerate(comparison.rows)
        for each in drawn[row.run.path].get(key, ())
    ]
    lines: tuple[tuple[str, float], ...] = ()
    if key == "step_memory":
        # a limit that the runs do not share would be read as that of all
        limits = {tuple(_limits(row.run, None)) for row in comparison.rows}
        lines = limits.pop() if len(limits) == 1 else ()
    axes = {"step": say("step"), "tokens": say("tokens"), "hours": say("hours of training")}
    return Picture(
        key=key,
        title=chart.title,
        axes={
            axis: title
            for axis, title in axes.items()
            if all(np.isfinite(each.x[axis]).any() for each in series)
        },
        y_title=chart.y_title,
        series=tuple(series),
        lines=lines,
        from_zero=chart.from_zero,
        note=chart.note,
        says=say("{title} of each step, of {num} runs", title=chart.title, num=len(drawn)),
    )


def interval_picture(comparison: Comparison) -> Picture | None:
    """Draw the differences of the eval losses to the first run, with their intervals."""
    rows = [
        (index, row, row.eval_difference)
        for index, row in enumerate(comparison.rows)
        if row.eval_difference is not None
    ]
    if not rows or comparison.tokens is None:
        return None
    series = [
        Series(
            row.name,
            {"x": [row.name]},
            np.array([found.mean]),
            "interval",
            run=index,
            colour=index,
            low=found.low,
            high=found.high,
        )
        for index, row, found in rows
    ]
    return Picture(
        key="intervals",
        title=say("Difference of the evaluation loss"),
        note=say(
            "to {name}, at {tokens} tokens; bars are 95 %",
            name=comparison.rows[0].name,
            tokens=format_count(comparison.tokens),
        ),
        axes={"x": say("run")},
        y_title=say("nats per token"),
        series=tuple(series),
        lines=((comparison.rows[0].name, 0.0),),
        says="; ".join(
            f"{row.name}: {found.mean:+.4f} ({found.low:+.4f}, {found.high:+.4f})"
            for _, row, found in rows
        ),
    )


def smoothed(values: Numbers) -> Numbers:
    """Return the exponential moving average, with the bias correction of Adam.

    Its half-life is a fraction of the run, so that runs of equal tokens are smoothed equally.
    Values that are not finite are skipped.
    """
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return np.full(len(values), np.nan)
    factor = 0.5 ** (1 / max(len(values) * SMOOTHED_FRACTION, 1))
    # in blocks, because the powers of a whole run would underflow
    block = max(int(np.log(1e-9) / np.log(factor)), 1)
    powers = factor ** np.arange(1, block + 1)
    means, mean = np.empty(len(known)), 0.0
    for start in range(0, len(known), block):
        part = values[known[start : start + block]]
        power = powers[: len(part)]
        means[start : start + block] = power * (mean + (1 - factor) * np.cumsum(part / power))
        mean = means[min(start + block, len(known)) - 1]
    means /= 1 - factor ** np.arange(1, len(known) + 1)
    place = np.searchsorted(known, np.arange(len(values)), side="right") - 1
    return np.where(place < 0, np.nan, means[np.maximum(place, 0)])


def memory_picture(run: RecordedRun) -> Picture | None:
    """Draw the memory over time, stacked by what occupies it, from memory.jsonl."""
    curve = run.memory
    layers = {name: sizes for name, sizes in _layers(curve) if sizes.any()}
    if not layers:
        return None
    totals = curve["device_total_bytes"]
    card = float(np.nanmax(totals)) if np.isfinite(totals).any() else None
    total = np.sum(list(layers.values()), axis=0)
    rows = thin_all([total, *layers.values()], MOST_TIMELINE_POINTS)
    minutes = curve["seconds"][rows] / 60
    series = [
        Series(name, {"x": minutes}, sizes[rows] / GIB, "area", colour=index)
        for index, (name, sizes) in enumerate(layers.items())
    ]
    series += _event_marks(run, minutes, total[rows] / GIB)
    return Picture(
        key=f"memory-{run.name}",
        title=say("Memory by class: {name}", name=run.name),
        axes={"x": say("minutes")},
        y_title="GiB",
        series=tuple(series),
        lines=tuple(_limits(run, card)),
        from_zero=True,
        says=say("Memory over time, highest {peak} GiB", peak=f"{np.nanmax(total) / GIB:.2f}"),
    )


def _layers(curve: Curve) -> Iterator[tuple[str, Numbers]]:
    """Yield the layers of the stack from the bottom, as (name, bytes).

    They are the classes that `fitune watch` shows, at their highest since the sample before.
    """
    if not len(curve["seconds"]):
        return

    def known(name: str) -> Numbers:
        return np.nan_to_num(curve[f"{name}_bytes"])

    def highest(name: str) -> Numbers:
        return np.nan_to_num(np.fmax(curve[f"{name}_bytes"], curve[f"peak_{name}_bytes"]))

    zero = np.zeros(len(curve["seconds"]))
    if np.isfinite(curve["allocated_bytes"]).any():
        allocated, reserved, others = (
            highest("allocated"), highest("reserved"), known("other_processes")
        )  # fmt: skip
        state = np.minimum(known("state"), allocated)
        yield say("weights, gradients, optimizer"), state
        yield say("activations, temporaries"), allocated - state
        yield say("cache (reserved, not in use)"), np.maximum(reserved - allocated, zero)
        context = known("device_used") - others - known("reserved")
        yield say("CUDA context"), np.maximum(context, zero)
        yield say("other processes"), others
    elif np.isfinite(curve["process_bytes"]).any():
        process = highest("process")
        program = np.minimum(known("program"), process)
        state = np.minimum(known("state"), process - program)
        yield say("program"), program
        yield say("weights, gradients, optimizer"), state
        yield say("activations, temporaries"), process - program - state


def _limits(run: RecordedRun, card_bytes: float | None) -> Iterator[tuple[str, float]]:
    """Yield the device's memory and the memory limit as (label, GiB)."""
    plan = run.plan or {}
    device = plan.get("device") or {}
    total = card_bytes or device.get("total_bytes")
    if isinstance(total, int | float):
        yield say("card") if _on_card(run) else say("memory of the machine"), total / GIB
    if isinstance(budget := plan.get("budget_bytes"), int | float):
        yield say("memory limit"), budget / GIB


def _on_card(run: RecordedRun) -> bool:
    """Return whether the run trained on a card."""
    kind = ((run.plan or {}).get("device") or {}).get("kind")
    if kind is not None:
        return bool(kind == "cuda")
    # without a plan: allocated memory is recorded on a card only
    return bool(np.isfinite(run.memory["allocated_bytes"]).any())


def _event_marks(run: RecordedRun, minutes: Numbers, top: Numbers) -> list[Series]:
    """Return marks on the curve at the times of the run's events."""
    if run.started is None or not run.events or not len(minutes):
        return []
    times = np.array([(event.time - run.started) / 60 for event in run.events[-200:]])
    labels = tuple(
        f"{say(event.kind)}: {translated(event.message)}"[:120] for event in run.events[-200:]
    )
    heights = np.interp(times, minutes, top)
    return [Series(say("events"), {"x": times}, heights, "marks", colour=5, labels=labels)]


def pareto_picture(comparison: Comparison) -> Picture | None:
    """Draw the peak memory against the eval loss; the size of a point is the speed of the run.

    Of two runs the table says as much.
    """
    rows = [
        (index, row)
        for index, row in enumerate(comparison.rows)
        if row.peak_bytes and (row.eval_loss or row.train_loss)
    ]
    if len(rows) < 3:
        return None
    fastest = max(row.tokens_per_second or 0.0 for _, row in rows) or 1.0
    series = []
    for index, row in rows:
        speed = "n/a" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        series.append(
            Series(
                f"{row.name} *" if row.on_front else row.name,
                {"x": np.array([(row.peak_bytes or 0) / GIB])},
                np.array([row.eval_loss if row.eval_loss is not None else row.train_loss or 0.0]),
                "points",
                run=index,
                colour=index,
                size=(row.tokens_per_second or 0.0) / fastest,
                labels=(f"{row.name}: {speed} tokens/s",),
            )
        )
    return Picture(
        key="pareto",
        title=say("Peak against loss"),
        note=say("a larger point is faster; * nothing else is better all round"),
        axes={"x": say("peak GiB")},
        y_title=say("eval loss"),
        series=tuple(series),
        says="; ".join(row.name for _, row in rows if row.on_front),
    )


def lengths_picture(runs: Sequence[RecordedRun]) -> Picture | None:
    """Draw the lengths of the training samples, of the first run that recorded them."""
    data = next(
        (run.data for run in runs if run.data and isinstance(run.data.get("lengths"), Mapping)),
        None,
    )
    if data is None:
        return None
    edges, counts = data["lengths"]["edges"], data["lengths"]["counts"]
    middles = (np.array(edges[:-1], float) + np.array(edges[1:], float)) / 2
    padding = (data.get("train") or {}).get("padding") or {}
    waste = ", ".join(f"{name} {value:.2f} x" for name, value in padding.items())
    return Picture(
        key="lengths",
        title=say("Lengths of the samples"),
        note=say(
            "tokens computed, padding included, for a real one: {waste}", waste=waste or "n/a"
        ),
        axes={"x": say("tokens")},
        y_title=say("samples"),
        from_zero=True,
        series=(Series("", {"x": middles}, np.array(counts, float), "bars"),),
        says=say(
            "Lengths of the training samples, cut at {length}", length=data.get("max_length", "n/a")
        ),
    )
