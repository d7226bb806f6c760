"""Writes a Picture as a PNG with matplotlib, which is optional, for a README or a paper."""

from pathlib import Path
from typing import Any

import numpy as np

from fitune.errors import UsageError
from fitune.report.charts import COLOURS, Picture, Series

_DASHES = ("-", "--", "-.", ":")
_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 8.0, 4.5, 150


def write_png(picture: Picture, path: Path, *, axis: str | None = None) -> None:
    """Write the picture as a PNG.

    axis: the horizontal axis; None for the picture's first.
    Raises UsageError if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures as PNG need matplotlib: pip install 'fitune[png]'") from error
    chosen = axis if axis is not None and axis in picture.axes else next(iter(picture.axes))
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    bottom: Any = 0.0
    bars = [series for series in picture.series if series.kind == "bars"]
    for series in picture.series:
        if series.kind == "area":
            plot.fill_between(
                series.x[chosen],
                bottom,
                bottom + series.y,
                color=_colour(series),
                label=_plain(series.name),
            )
            bottom = bottom + series.y
        else:
            _draw(plot, series, axis=chosen, bars=bars)
    for label, y in picture.lines:
        plot.axhline(y, color="black", linewidth=0.8, linestyle=":")
        plot.annotate(
            _plain(label),
            (0.995, y),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    plot.set_title(_plain(picture.title), fontsize=10)
    plot.set_xlabel(_plain(picture.axes[chosen]))
    plot.set_ylabel(_plain(picture.y_title))
    plot.grid(alpha=0.25)
    if any(series.name for series in picture.series):
        plot.legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)


def _draw(plot: Any, series: Series, *, axis: str, bars: list[Series]) -> None:
    x, style = series.x[axis], {"color": _colour(series), "label": _plain(series.name) or None}
    match series.kind:
        case "bars":
            places = np.arange(len(x)) if len(x) and isinstance(x[0], str) else np.asarray(x)
            width = 0.8 * (np.diff(places).min() if len(places) > 1 else 1) / len(bars)
            plot.bar(
                places + (bars.index(series) - (len(bars) - 1) / 2) * width,
                series.y,
                width,
                **style,
            )
            if len(x) and isinstance(x[0], str):
                plot.set_xticks(places, [_plain(str(name))[:20] for name in x])
        case "marks":
            plot.plot(x, series.y, "D", markersize=4, **style)
        case "points":
            plot.scatter(x, series.y, s=40 + 160 * series.size, **style)
        case "interval":
            ends = [[series.y[0] - series.low], [series.high - series.y[0]]]
            plot.errorbar(x, series.y, ends, fmt="o", capsize=4, **style)
        case "faint":
            plot.plot(x, series.y, color=_colour(series), alpha=0.25, linewidth=0.8)
        case "marked line":
            plot.plot(x, series.y, "o-", markersize=4, linewidth=1.4, **style)
        case _:
            plot.plot(x, series.y, _DASHES[series.dash % len(_DASHES)], linewidth=1.4, **style)


def _colour(series: Series) -> str:
    return COLOURS[series.colour % len(COLOURS)]


def _plain(text: str) -> str:
    """Return the text without what matplotlib reads as mathematics, at most 80 characters."""
    return text.replace("$", r"\$").lstrip("_")[:80]
