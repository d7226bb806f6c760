"""Describes the pictures of a comparison as data: series with their axes.

`page.py` draws a Picture with plotly, `png.py` with matplotlib. The colours are the eight of Okabe
and Ito, which are distinguishable with any kind of colour blindness; runs differ in their dashes
too. A picture has at most MAX_POINTS points over all runs, and thinning keeps every extreme.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fitune.language import say
from fitune.report.compare import Comparison
from fitune.report.run_figures import planned_candidate
from fitune.report.run_on_disk import Curve, RecordedRun
from fitune.report.thin import thin, thin_all
from fitune.units import GIB

Kind = Literal["line", "faint", "area", "marks", "bars", "points"]
#: the parts of the page that have pictures
Section = Literal["comparison", "loss", "memory", "peak", "data"]
Numbers = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
MAX_POINTS = 6000
MOST_TIMELINES = 4
#: the half-life of the smoothed loss as a fraction of the run, so that runs of equal tokens are
#: smoothed equally
SMOOTHED_FRACTION = 0.03
_CATEGORIES = (
    "parameter", "gradient", "optimizer_state", "activation", "temporary", "input", "workspace",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """A line, area, group of bars or group of points in a picture."""

    name: str
    #: the values for each axis of the picture; text is allowed on an axis 'x'
    x: Mapping[str, Sequence[Any] | Numbers]
    y: Numbers
    kind: Kind = "line"
    #: an index into COLOURS
    colour: int = 0
    #: the number of the line's dash pattern
    dash: int = 0
    #: of points, between 0 and 1
    sizes: Numbers | None = None
    #: a text for each point
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a comparison."""

    #: the name of the picture in the page and of its file
    key: str
    #: the part of the page that it is in
    section: Section
    title: str
    #: the horizontal axes: name -> title
    axes: Mapping[str, str]
    y_title: str
    series: tuple[Series, ...]
    #: (label, y) of horizontal lines
    lines: tuple[tuple[str, float], ...] = ()
    #: whether the vertical axis begins at zero, as for bytes and counts
    from_zero: bool = True
    #: what the picture shows, as text for users who cannot see it
    says: str = field(default="")


def pictures(comparison: Comparison) -> list[Picture]:
    """Return the pictures for which there is data, in the order of the page."""
    runs = [row.run for row in comparison.rows]
    found = [
        loss_picture(comparison),
        *(memory_picture(run, most_points=MAX_POINTS // 2) for run in runs[:MOST_TIMELINES]),
        predicted_picture(comparison),
        *(microscope_picture(run) for run in runs[:MOST_TIMELINES]),
        pareto_picture(comparison),
        lengths_picture(runs),
        curve_picture(runs, "lr", title=say("Learning rate"), y_title=say("learning rate")),
        curve_picture(
            runs,
            "grad_norm",
            title=say("Gradient norm before clipping"),
            y_title=say("norm"),
            from_zero=False,
        ),
        curve_picture(
            runs,
            "margin",
            title=say("Margin of a pair"),
            y_title=say("reward"),
            from_zero=False,
        ),
        curve_picture(
            runs, "pair_accuracy", title=say("Chosen answers preferred"), y_title=say("share")
        ),
        noise_picture(runs),
    ]
    return [picture for picture in found if picture is not None and picture.series]


def loss_picture(comparison: Comparison) -> Picture | None:
    ran = [row.run for row in comparison.rows if row.run.num_steps or len(row.run.evals["step"])]
    if not ran:
        return None
    share = max(MAX_POINTS // (2 * len(ran)), 40)
    series = [each for index, run in enumerate(ran) for each in _loss_series(run, index, share)]
    return Picture(
        key="loss",
        section="loss",
        from_zero=False,
        title=say("Loss"),
        axes=_known_axes(series),
        y_title=say("nats per token"),
        series=tuple(series),
        says=say(
            "Training loss, raw and smoothed, and loss on the held-out samples, of {num} runs",
            num=len(ran),
        ),
    )


def curve_picture(
    runs: Sequence[RecordedRun], name: str, *, title: str, y_title: str, from_zero: bool = True
) -> Picture | None:
    """Draw a column of the runs' metrics, step by step.

    name: the column's name in metrics.jsonl.
    """
    known = [(index, run) for index, run in enumerate(runs) if np.isfinite(run.train[name]).any()]
    share = max(MAX_POINTS // (4 * max(len(known), 1)), 40)
    series = []
    for index, run in known:
        rows = thin(run.train[name], share)
        series.append(
            Series(run.name, _axes(run.train, rows), run.train[name][rows], "line", index, index)
        )
    if not series:
        return None
    return Picture(
        key=name,
        section="loss",
        from_zero=from_zero,
        title=title,
        axes=_known_axes(series),
        y_title=y_title,
        series=tuple(series),
        says=say("{title} of each step, of {num} runs", title=title, num=len(series)),
    )


def _known_axes(series: Sequence[Series]) -> dict[str, str]:
    """Return the horizontal axes, name -> title, for which all series have values."""
    axes = {"step": say("step"), "tokens": say("tokens"), "hours": say("hours of training")}
    return {
        axis: title
        for axis, title in axes.items()
        if all(np.isfinite(each.x[axis]).any() for each in series)
    }


def _loss_series(run: RecordedRun, index: int, share: int) -> Iterator[Series]:
    loss = run.train["loss"]
    if len(loss):
        rows = thin(loss, share)
        smooth = smoothed(loss, 0.5 ** (1 / max(len(loss) * SMOOTHED_FRACTION, 1)))
        yield Series(run.name, _axes(run.train, rows), loss[rows], "faint", index, index)
        rows = thin(smooth, share)
        name = say("{name} train, smoothed", name=run.name)
        yield Series(name, _axes(run.train, rows), smooth[rows], "line", index, index)
    if len(run.evals["step"]):
        rows = thin(run.evals["eval_loss"], 200)
        name = say("{name} eval", name=run.name)
        yield Series(
            name, _axes(run.evals, rows), run.evals["eval_loss"][rows], "marks", index, index
        )


def _axes(curve: Curve, rows: npt.NDArray[np.int64]) -> dict[str, Numbers]:
    return {
        "step": curve["step"][rows],
        "tokens": curve["total_tokens"][rows],
        "hours": curve["seconds"][rows] / 3600,
    }


def smoothed(values: Numbers, factor: float) -> Numbers:
    """Return the exponential moving average, with the bias correction of Adam.

    Values that are not finite are skipped.
    """
    found = np.full(len(values), np.nan)
    mean = weight = 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            mean, weight = factor * mean + (1 - factor) * value, factor * weight + (1 - factor)
        found[index] = mean / weight if weight else np.nan
    return found


def memory_picture(run: RecordedRun, *, most_points: int) -> Picture | None:
    """Draw the memory over time, stacked by what occupies it.

    The data is memory.jsonl; if there is none, the peaks of the steps are drawn.
    """
    curve = run.memory
    totals = curve["device_total_bytes"]
    card = np.nanmax(totals) if np.isfinite(totals).any() else None
    layers = dict(_layers(curve))
    if not layers:
        return _step_peaks(run, most_points)
    rows = thin_all([np.sum(list(layers.values()), axis=0), *layers.values()], most_points)
    minutes = curve["seconds"][rows] / 60
    series = [
        Series(name, {"x": minutes}, sizes[rows] / GIB, "area", index)
        for index, (name, sizes) in enumerate(layers.items())
    ]
    total = np.sum(list(layers.values()), axis=0)
    series += _event_marks(run, minutes, total[rows] / GIB)
    return Picture(
        key=f"memory-{run.name}",
        section="memory",
        title=say("Memory over time: {name}", name=run.name),
        axes={"x": say("minutes")},
        y_title="GiB",
        series=tuple(series),
        lines=tuple(_limits(run, card)),
        says=say("Memory over time, highest {peak} GiB", peak=f"{np.nanmax(total) / GIB:.2f}"),
    )


def _layers(curve: Curve) -> Iterator[tuple[str, Numbers]]:
    """Yield the layers of the stack from the bottom, as (name, bytes).

    On a card: the model's state, other allocated memory, PyTorch's cache, other processes. On a
    CPU: the model's state and the rest of the process.
    """
    if not len(curve["seconds"]):
        return
    zero = np.zeros(len(curve["seconds"]))

    def highest(name: str) -> Numbers:
        return np.fmax(curve[name], curve[f"peak_{name}"])

    allocated, reserved, process = (
        highest(f"{name}_bytes") for name in ("allocated", "reserved", "process")
    )
    state = np.nan_to_num(curve["state_bytes"])
    if np.isfinite(allocated).any():
        allocated, reserved = np.nan_to_num(allocated), np.nan_to_num(reserved)
        state = np.minimum(state, allocated)
        yield say("parameters, gradients, optimizer"), state
        yield say("activations and the rest"), allocated - state
        yield say("cache (reserved - allocated)"), np.maximum(reserved - allocated, zero)
    elif np.isfinite(process).any():
        process = np.nan_to_num(process)
        state = np.minimum(state, process)
        yield say("parameters, gradients, optimizer"), state
        yield say("the rest of the process"), process - state
    else:
        return
    if np.isfinite(curve["other_processes_bytes"]).any() and np.isfinite(allocated).any():
        yield say("other processes"), np.nan_to_num(curve["other_processes_bytes"])


def _step_peaks(run: RecordedRun, most_points: int) -> Picture | None:
    names = {
        "peak_allocated_bytes": say("allocated"),
        "peak_reserved_bytes": say("reserved"),
        "device_used_bytes": say("process"),
    }
    known = [name for name in names if np.isfinite(run.train[name]).any()]
    if not known:
        return None
    rows = thin_all([run.train[name] for name in known], most_points)
    steps = {"x": run.train["step"][rows]}
    series = [
        Series(names[name], steps, run.train[name][rows] / GIB, "line", index, index)
        for index, name in enumerate(known)
    ]
    highest = max(float(np.nanmax(run.train[name])) for name in known)
    return Picture(
        key=f"memory-{run.name}",
        section="memory",
        title=say("Peak memory of each step: {name}", name=run.name),
        axes={"x": say("step")},
        y_title="GiB",
        series=tuple(series),
        lines=tuple(_limits(run, None)),
        says=say("Peak memory of each step, highest {peak} GiB", peak=f"{highest / GIB:.2f}"),
    )


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
    labels = tuple(f"{event.kind}: {event.message}"[:120] for event in run.events[-200:])
    heights = np.interp(times, minutes, top)
    return [Series(say("events"), {"x": times}, heights, "marks", 5, labels=labels)]


def predicted_picture(comparison: Comparison) -> Picture | None:
    rows = [row for row in comparison.rows if row.prediction_error is not None]
    names = [row.name for row in rows]
    sides = (
        (say("predicted"), [row.predicted_bytes or 0 for row in rows]),
        (say("measured"), [row.measured_bytes or 0 for row in rows]),
    )
    series = [
        Series(name, {"x": names}, np.array(sizes, float) / GIB, "bars", index)
        for index, (name, sizes) in enumerate(sides)
    ]
    if not rows:
        return None
    return Picture(
        key="predicted",
        section="memory",
        title=say("Peak memory of the predicted step, and as measured in it"),
        axes={"x": say("run")},
        y_title="GiB",
        series=tuple(series),
        says="; ".join(f"{row.name}: {row.prediction_error:+.1%}" for row in rows),
    )


def microscope_picture(run: RecordedRun) -> Picture | None:
    """Draw the tensors that are predicted to be live at the peak, by category.

    The prediction is that of the run's own samples, else the plan's for the longest samples.
    """
    peak = run.peak or planned_candidate(run) or {}
    categories = peak.get("categories")
    if not isinstance(categories, Mapping):
        return None
    known = [(name, float(categories[name])) for name in _CATEGORIES if categories.get(name)]
    phase = str(peak.get("peak_phase", "n/a"))
    names, sizes = [name for name, _ in known], np.array([size for _, size in known])
    series = Series("", {"x": names}, sizes / GIB, "bars", 0)
    return Picture(
        key=f"microscope-{run.name}",
        section="peak",
        title=say("Alive at the peak, in {phase}: {name}", phase=phase, name=run.name),
        axes={"x": say("category")},
        y_title="GiB",
        series=(series,) if known else (),
        says="; ".join(f"{name}: {size / GIB:.2f} GiB" for name, size in known),
    )


def pareto_picture(comparison: Comparison) -> Picture | None:
    """Draw the peak memory against the eval loss; the size of a point is the speed of the run."""
    rows = [row for row in comparison.rows if row.peak_bytes and (row.eval_loss or row.train_loss)]
    if len(rows) < 2:
        return None
    speeds = np.array([row.tokens_per_second or 0.0 for row in rows])
    sizes = speeds / speeds.max() if speeds.max() > 0 else np.ones(len(rows))
    series = []
    for index, row in enumerate(rows):
        speed = "n/a" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        series.append(
            Series(
                f"{row.name} *" if row.on_front else row.name,
                {"x": np.array([(row.peak_bytes or 0) / GIB])},
                np.array([row.eval_loss if row.eval_loss is not None else row.train_loss or 0.0]),
                "points",
                index,
                sizes=sizes[index : index + 1],
                labels=(f"{row.name}: {speed} tokens/s",),
            )
        )
    return Picture(
        key="pareto",
        section="comparison",
        from_zero=False,
        title=say(
            "Peak against loss; a larger point is faster; * nothing else is better all round"
        ),
        axes={"x": say("peak GiB")},
        y_title=say("eval loss"),
        series=tuple(series),
        says="; ".join(row.name for row in rows if row.on_front),
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
        section="data",
        title=say(
            "Tokens of a sample; tokens computed, padding included, for a real one: {waste}",
            waste=waste or "n/a",
        ),
        axes={"x": say("tokens")},
        y_title=say("samples"),
        series=(Series("", {"x": middles}, np.array(counts, float), "bars", 0),),
        says=say(
            "Lengths of the training samples, cut at {length}", length=data.get("max_length", "n/a")
        ),
    )


def noise_picture(runs: Sequence[RecordedRun]) -> Picture | None:
    """Draw the noise scale of the gradient over the run, in tokens."""
    series = []
    for index, run in enumerate(runs):
        scale = run.train["noise_scale_tokens"]
        if np.isfinite(scale).any():
            rows = thin(scale, max(MAX_POINTS // (4 * len(runs)), 40))
            tokens = {"x": run.train["total_tokens"][rows]}
            series.append(Series(run.name, tokens, scale[rows], "line", index, index))
    if not series:
        return None
    return Picture(
        key="noise",
        section="loss",
        from_zero=False,
        title=say("Noise scale: the batch beyond which more samples a step stop paying"),
        axes={"x": say("tokens")},
        y_title=say("tokens a step"),
        series=tuple(series),
        says=say("Noise scale over the run, of {num} runs", num=len(series)),
    )
