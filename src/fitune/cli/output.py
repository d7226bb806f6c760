"""How the verbs speak: data on stdout, progress and warnings on stderr."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from fitune.errors import UsageError

SCHEMA = 1
MAX_WIDTH = 100

Format = Annotated[
    Literal["auto", "human", "json", "quiet"],
    Parameter(
        name="--format",
        help="auto: for people, with colours in a terminal only. human: with colours everywhere. json: one object. "
        "quiet: the least that a script needs.",
    ),
]


def console(output_format: str = "auto") -> Console:
    """Writes to stdout, at most 100 columns wide, and in a terminal at most as wide as that (or COLUMNS); NO_COLOR is
    honoured."""
    console = Console(file=sys.stdout, highlight=False, force_terminal=True if output_format == "human" else None)
    console.width = min(console.width, MAX_WIDTH) if console.is_terminal else MAX_WIDTH
    return console


def print_json(content: Mapping[str, Any]) -> None:
    print(json.dumps({"schema": SCHEMA, **content}, indent=2, ensure_ascii=False, allow_nan=False))


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
        grid.add_row(*row)
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
        raise UsageError(f"{path} cannot be created: {error.strerror}; give another place with {flag}") from error


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
