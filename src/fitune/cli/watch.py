"""Implement `fitune watch`, which shows a run live by reading its files."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.live import Live
from rich.text import Text

from fitune.cli.arguments import RUNS, run_path
from fitune.cli.output import OUTPUT, SCHEMA, Format, Screen, print_text, stdout_screen
from fitune.cli.watch_screen import ASCII, watch_json, watch_screen
from fitune.errors import RunDirectoryError
from fitune.language import say, translated
from fitune.language.printable import json_text, printable_line
from fitune.run.directory import BEGIN_ONE, RunDirectory, list_runs, open_run
from fitune.run.follow import RunFollower, RunView

REFRESH_SECONDS = 1.0
KEY_SECONDS = 0.1
PLAIN_EVERY_SECONDS = 10.0


def watch(
    run: Annotated[
        Path | None, Parameter(help="a run's directory or name; the latest where left out")
    ] = None,
    /,
    *,
    output: Annotated[Path, Parameter(help="where runs are kept")] = RUNS,
    once: Annotated[bool, Parameter(help="show it once, and leave")] = False,
    as_json: Annotated[
        bool,
        Parameter(name="--json", help="the same as --format json: a line a second", group=OUTPUT),
    ] = False,
    output_format: Format = "auto",
) -> None:
    """Show a run live, or how it ended: a screen in a terminal, plain lines elsewhere.

    In a terminal, q leaves the screen without stopping the run. Only the run's files are read, so
    it works over ssh, on a copy, and for a run on another machine with a shared disk.
    """
    follower = RunFollower(find_run(run, output))
    console = stdout_screen(output_format)
    if as_json or output_format == "json":
        _print_json_lines(follower, once=once)
    elif output_format == "quiet":
        print_text(follower.read().record.state)
    elif once or _is_over(view := follower.read()):
        console.print(
            _shown(follower.read() if once else view, console, height=None), soft_wrap=True
        )
    elif console.is_terminal:
        _live(follower, console)
    else:
        _print_plain_lines(follower, console)


def find_run(run: Path | None, output: Path) -> RunDirectory:
    """Find the run to watch.

    run: the run's directory, or its name in `output`. If it is None or a directory of runs, the
        running one is taken, else the latest.

    Raises RunDirectoryError if there is no run.
    """
    if run is not None and not run.exists():
        return open_run(run_path(run, output))
    place = output if run is None else run
    with suppress(RunDirectoryError):
        return open_run(place)
    records = list_runs(place)
    if not records:
        raise RunDirectoryError(f"there are no runs in {place}: {BEGIN_ONE}")
    running = [record for record in records if record.state == "running"]
    return (running or records)[-1].run


def _is_over(view: RunView) -> bool:
    return view.record.state != "running"


def _shown(view: RunView, console: Screen, *, height: int | None) -> Text:
    text = watch_screen(view, width=console.width, height=height, now=time.time())
    if console.options.ascii_only:
        text.plain = text.plain.translate(ASCII)
    return text


def _live(follower: RunFollower, console: Screen) -> None:
    """Show the screen until the run ends or q is pressed; print the final state at the end."""
    view = follower.read()
    with Live(console=console, screen=True, auto_refresh=False) as live, _keys() as pressed:
        try:
            while not _is_over(view):
                text = _shown(view, console, height=console.height - 1)
                live.update(
                    Text("\n").join([text, Text(say("q leaves; the run goes on"), style="dim")]),
                    refresh=True,
                )
                due = time.monotonic() + REFRESH_SECONDS
                while time.monotonic() < due:
                    if pressed() in ("q", "Q"):
                        return
                view = follower.read()
        except KeyboardInterrupt:
            return
    console.print(_shown(view, console, height=None), soft_wrap=True)


def _print_json_lines(follower: RunFollower, *, once: bool) -> None:
    while True:
        view = follower.read()
        content = {"schema": SCHEMA, **watch_json(view, now=time.time())}
        print_text(json_text(content))
        if once or _is_over(view):
            return
        time.sleep(REFRESH_SECONDS)


def _print_plain_lines(follower: RunFollower, console: Screen) -> None:
    """Print a status line every ten seconds, each event once, and the final state at the end."""
    num_printed, last = 0, -PLAIN_EVERY_SECONDS
    while not _is_over(view := follower.read()):
        for event in view.events[num_printed:]:
            print_text(f"{say('step')} {event.step}: {translated(printable_line(event.message))}")
        num_printed = len(view.events)
        if time.monotonic() - last >= PLAIN_EVERY_SECONDS:
            last = time.monotonic()
            print_text(_shown(view, console, height=1).plain)
        time.sleep(REFRESH_SECONDS)
    console.print(_shown(view, console, height=None), soft_wrap=True)


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Provide a function that returns the key pressed within KEY_SECONDS, or '' if none is."""
    if sys.platform == "win32":
        import msvcrt

        def pressed() -> str:
            time.sleep(KEY_SECONDS)
            return msvcrt.getwch() if msvcrt.kbhit() else ""

        yield pressed
        return
    import select
    import termios
    import tty

    if not sys.stdin.isatty():

        def wait() -> str:
            time.sleep(KEY_SECONDS)
            return ""

        yield wait
        return
    stdin = sys.stdin.fileno()

    def key() -> str:
        return (
            os.read(stdin, 1).decode(errors="ignore")
            if select.select([stdin], [], [], KEY_SECONDS)[0]
            else ""
        )

    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    try:
        yield key
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
