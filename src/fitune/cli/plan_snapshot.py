"""Implement `fitune plan --snapshot FILE`, which shows what filled a card by its own recording."""

from dataclasses import asdict
from pathlib import Path

from fitune.allocator.peaks import highest_peak
from fitune.allocator.replay import ReplaySettings, replay
from fitune.cli.output import console, print_json, print_text, table
from fitune.language import say, translated
from fitune.trace.snapshot import read_history
from fitune.units import format_bytes, format_gib


def show_snapshot(path: Path, output_format: str) -> None:
    """Print what was alive at the peak of a snapshot, and which allocations failed.

    Raises UsageError for a file that is no snapshot.
    """
    history = read_history(path)
    trace, failed = history.trace, history.failed
    peak = highest_peak(trace)
    result = replay(trace, ReplaySettings())
    if output_format == "json":
        print_json(
            {
                "peak": asdict(peak),
                "peak_reserved_bytes": result.peak_reserved_bytes,
                "failed": [asdict(each) for each in failed],
            }
        )
        return
    if output_format == "quiet":
        print_text(peak.num_bytes)
        return
    screen = console(output_format)
    for each in failed[:1]:
        screen.print(
            say(
                "out of memory: {asked} were asked for, with {free} free on the card",
                asked=format_bytes(each.num_bytes),
                free=format_bytes(each.free_bytes),
            ),
            soft_wrap=True,
        )
    rows = [(say(name), format_gib(size, 2)) for name, size in peak.categories.items() if size]
    rows += [
        (say("allocated"), format_gib(peak.num_bytes, 2)),
        (say("reserved"), format_gib(result.peak_reserved_bytes, 2)),
    ]
    screen.print(table((say("at the peak ({phase})", phase=say(peak.phase)), ">GiB"), rows))
    screen.print(
        table(
            (say("allocated by"), ">GiB"),
            [
                (each.name or say("before the recording"), format_gib(each.num_bytes, 2))
                for each in peak.modules
            ],
        )
    )
    for sentence in trace.source:
        screen.print(translated(sentence), soft_wrap=True)
