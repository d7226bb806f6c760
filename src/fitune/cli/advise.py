"""Implement `fitune advise`, which suggests changes to a run, best first."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fitune.cli.arguments import run_path
from fitune.cli.compare import Runs
from fitune.cli.output import Format, console, print_json, print_text, table
from fitune.language import say
from fitune.report.advice import advise as find_advice
from fitune.report.compare import compare


def advise(
    run: Annotated[
        Path,
        Parameter(
            name="RUN",
            help="the run to advise on, its directory or name, or a report with it first",
        ),
    ],
    *others: Runs,
    output_format: Format = "auto",
) -> None:
    """Rank changes to a run by their effect on memory and speed.

    Each change says whether the training result stays the same, on which evidence it rests, and
    which command makes it. The other runs serve as evidence.
    """
    comparison = compare([run_path(each) for each in (run, *others)])
    found = find_advice(comparison.rows[0].run, comparison)
    if output_format == "json":
        print_json({"run": comparison.rows[0].name, "advice": [asdict(each) for each in found]})
        return
    if output_format == "quiet":
        for each in found:
            print_text(each.command)
        return
    screen = console(output_format)
    if not found:
        screen.print(
            say(
                "nothing to change in {name}, as far as its record tells",
                name=comparison.rows[0].name,
            )
        )
        return
    heads = [say("change"), say(">memory"), say(">speed"), say("result")]
    rows = [
        [f"{index} {each.change}", each.memory, each.speed, each.effect]
        for index, each in enumerate(found, start=1)
    ]
    screen.print(table(heads, rows))
    for index, each in enumerate(found, start=1):
        screen.print(f"{index}  {each.evidence}", soft_wrap=True)
        if each.command:
            screen.print(f"   {each.command}", soft_wrap=True)
