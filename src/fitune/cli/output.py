"""How the verbs speak: data on stdout, progress and warnings on stderr."""

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
    """What is shown on it is text: none of it is markup, and control characters in it are shown, not sent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(output_format: str = "auto") -> Screen:
    """Writes to stdout, at most 100 columns wide, and in a terminal at most as wide as that (or COLUMNS); NO_COLOR is
    honoured."""
    screen = stdout_screen(output_format)
    screen.width = min(screen.width, MAX_WIDTH) if screen.is_terminal else MAX_WIDTH
    return screen


def stdout_screen(output_format: str = "auto") -> Screen:
    """As `console`, as wide as the terminal is."""
    return Screen(file=sys.stdout, force_terminal=True if output_format == "human" else None)


def html_block(show: Callable[[Screen], None]) -> str:
    """What `show` prints, as one block of a notebook in a font of equal widths. In a notebook rich would show each line
    by itself as well, which force_jupyter=False prevents."""
    screen = Screen(file=io.StringIO(), record=True, width=MAX_WIDTH, force_jupyter=False)
    show(screen)
    return screen.export_html(inline_styles=True, code_format=_BLOCK)


def print_text(text: object, *, end: str = "\n") -> None:
    """On stdout, at once."""
    print(printable(str(text)), end=end, flush=True)


def print_aside(text: object) -> None:
    """On stderr: progress, warnings, errors."""
    print(printable(str(text)), file=sys.stderr, flush=True)


def print_json(content: Mapping[str, Any]) -> None:
    print_text(json_text({"schema": SCHEMA, **content}, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A heading that starts with '>' is a column of numbers, set to the right. The first column folds where the table
    is too wide, so that no number is ever cut."""
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
    """What -o names. Raises UsageError for a directory, be it one that is not there yet."""
    path = Path(text)
    if path.is_dir() or text.endswith(("/", os.sep)):
        raise UsageError(f"{text} names a directory: give a file, such as -o {path / example}")
    return path


def make_directory(path: Path, *, flag: str) -> None:
    """Raises UsageError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be created: {error.strerror}; give another place with {flag}"
        ) from error


def warn(sentence: str) -> None:
    print_aside(say("warning: {sentence}", sentence=translated(sentence)))
