"""Implement `fitune report`, which writes runs as one offline HTML file and charts as PNG."""

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fitune.board.offline import write_page
from fitune.cli.arguments import run_path
from fitune.cli.compare import Runs
from fitune.cli.output import OUTPUT, Format, make_directory, output_file, print_json, print_text
from fitune.errors import UsageError
from fitune.report.charts import pictures
from fitune.report.compare import compare
from fitune.report.png import write_png
from fitune.run.directory import RunDirectory


def report(
    *runs: Runs,
    output: Annotated[
        str | None,
        Parameter(
            name=("--output", "-o"),
            metavar="PATH",
            help="the file; report.html in the run where left out",
            group=OUTPUT,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        Parameter(help="a directory for each picture as PNG (needs matplotlib)", group=OUTPUT),
    ] = None,
    lang: Annotated[
        Literal["en", "zh"] | None,
        Parameter(help="the page's language (FITUNE_LANG)", group=OUTPUT),
    ] = None,
    output_format: Format = "auto",
) -> None:
    """Write one HTML file that needs no network.

    It shows losses, memory, predictions, a comparison, advice, events and settings, and contains
    its data, so that `fitune compare` can read it again.
    """
    if not runs:
        raise UsageError("give the runs to report on: fitune report runs/NAME -o report.html")
    # Check -o before reading the runs, which may take long.
    given = None if output is None else output_file(output, example="report.html")
    if lang is not None:
        os.environ["FITUNE_LANG"] = lang
    runs = tuple(map(run_path, runs))
    comparison = compare(runs)
    inside = RunDirectory(runs[0]).report if runs[0].is_dir() else Path("report.html")
    path = given or (inside if len(runs) == 1 else Path("report.html"))
    write_page(comparison, path, place="-o")
    drawn = []
    if png is not None:
        make_directory(png, flag="--png")
        for index, picture in enumerate(pictures(comparison), start=1):
            drawn.append(png / f"{index}-{picture.key.partition('-')[0]}.png")
            write_png(picture, drawn[-1], axis="tokens")
    if output_format == "json":
        print_json({"report": str(path), "pictures": [str(file) for file in drawn]})
    else:
        print_text(path)
        for file in drawn:
            print_text(file)
