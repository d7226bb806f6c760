"""Print the output of the verbs: data on stdout, progress and warnings on stderr."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from fitune.errors import UsageError
from fitune.language import say, translated
from fitune.language.printable import json_text, printable

SCHEMA = 1
MAX_WIDTH = 100
_BLOCK = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2;font-family:monospace">{code}</pre>'

OUTPUT = Group("Output", sort_key=9)
Format = Annotated[
    Literal["auto", "human", "json", "quiet"],
    Parameter(
        name="--format",
        group=OUTPUT,
        help="auto: for people, with colours in a terminal only. human: with colours everywhere. "
        "json: one object. quiet: the least that a script needs.",
    ),
]


class Screen(Console):
    """A console that prints text without interpreting markup, and escapes control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(output_format: str = "auto") -> Screen:
    """Return a screen on stdout of at most 100 columns and at most the width of the terminal.

    Respects COLUMNS and NO_COLOR.
    """
    screen = stdout_screen(output_format)
    screen.width = min(screen.width, MAX_WIDTH) if screen.is_terminal else MAX_WIDTH
    return screen


def stdout_screen(output_format: str = "auto") -> Screen:
    """Return a screen on stdout that is as wide as the terminal."""
    return Screen(file=sys.stdout, force_terminal=True if output_format == "human" else None)


def html_block(show: Callable[[Screen], None]) -> str:
    """Return what `show` prints as one HTML block in a monospaced font, for a notebook."""
    # force_jupyter=False stops rich from displaying each line in the notebook by itself.
    screen = Screen(file=io.StringIO(), record=True, width=MAX_WIDTH, force_jupyter=False)
    show(screen)
    return screen.export_html(inline_styles=True, code_format=_BLOCK)


def print_text(text: object, *, end: str = "\n") -> None:
    """Print on stdout and flush it."""
    print(printable(str(text)), end=end, flush=True)


def print_aside(text: object) -> None:
    """Print progress, a warning or an error on stderr."""
    print(printable(str(text)), file=sys.stderr, flush=True)


def print_json(content: Mapping[str, object]) -> None:
    print_text(json_text({"schema": SCHEMA, **content}, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table. A heading that starts with '>' marks a right-aligned column of numbers.

    If the table is too wide, the first column wraps, so that no number is cut off.
    """
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, heading in enumerate(columns):
        right = heading.startswith(">")
        grid.add_column(
            heading.removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=index > 0,
        )
    for row in rows:
        grid.add_row(*map(printable, row))
    return grid


def output_file(text: str, *, example: str) -> Path:
    """Return the path that -o names. Raises UsageError if it is a directory or ends like one."""
    path = Path(text)
    if path.is_dir() or text.endswith(("/", os.sep)):
        raise UsageError(f"{text} names a directory: give a file, such as -o {path / example}")
    return path


def make_directory(path: Path, *, flag: str) -> None:
    """Create a directory and its parents. Raises UsageError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be created: {error.strerror}; give another place with {flag}"
        ) from error


def warn(message: str) -> None:
    print_aside(say("warning: {sentence}", sentence=translated(message)))
