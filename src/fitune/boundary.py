"""Turns exceptions of other libraries into a FituneError with one message.

    with raised_as(ModelError, "w.pth cannot be read as weights", "copy it again"):
        around a parser
    @bounded("fitune.plan")
        around a public function
    unexpected(error, doing)
        for the command line

`raised_as` gives the true cause, because a parser's caller knows what was parsed. The other two are
for exceptions that nobody expected: they give the class, the place, what was being done, and what
the user can do. FITUNE_DEBUG=1 shows the traceback.
"""

import functools
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fitune.errors import FituneError, OutOfMemoryError, UnexpectedError

P = ParamSpec("P")
R = TypeVar("R")
#: the most characters of another library's message
MOST_CHARS = 300
#: the most digits of a whole number in JSON
MOST_DIGITS = 300
_MANY_DIGITS = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")


@contextmanager
def raised_as(kind: type[FituneError], what: str, way_out: str) -> Iterator[None]:
    """Raise a `kind` for any exception in this block: "what (cause); way_out".

    A FituneError, and exceptions that end the process, pass unchanged.
    """
    try:
        yield
    except FituneError:
        raise
    except Exception as error:
        raise kind(f"{what} ({cause_of(error)}); {way_out}") from error


def bounded(name: str, *, calls_back: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it raises no Exception but FituneError.

    name: the public name of the function.
    calls_back: whether the function calls functions of the caller, in the caller's own training.
        Exceptions of these pass unchanged.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*arguments: P.args, **options: P.kwargs) -> R:
            try:
                return function(*arguments, **options)
            except FituneError:
                raise
            except Exception as error:
                if calls_back and _passed_others_code(error):
                    raise
                raise unexpected(error, name) from error

        return wrapper

    return decorate


def unexpected(error: Exception, doing: str) -> FituneError:
    """Return the error to raise for an exception that nobody expected.

    doing: the command or function in which it was raised.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            f"{doing} ran out of memory ({cause_of(error)}): close other programs, or give it a smaller model or batch"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return UnexpectedError(f"{doing} cannot go on: {error.filename}: {error.strerror}")
    return UnexpectedError(
        f"{doing} met an error that it does not know: {type(error).__name__} at {place_of(error)}: "
        f"{_first_line(error)}; FITUNE_DEBUG=1 shows the whole of it: look there for what was given, and report it "
        "where that is right"
    )


def is_debugging() -> bool:
    """Return whether FITUNE_DEBUG asks for tracebacks and for all that libraries print."""
    return os.environ.get("FITUNE_DEBUG", "0") not in ("", "0")


def cause_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def is_panic(error: BaseException) -> bool:
    """Return whether this is a panic of a library in Rust, which is no subclass of Exception."""
    return type(error).__name__ == "PanicException"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as json.loads does, but raise ValueError for everything that is wrong.

    That includes text that is nested too deeply, and whole numbers that are too large for a float.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        return json.loads(text, parse_int=bounded_int if _MANY_DIGITS.search(text) else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def bounded_int(digits: str) -> int:
    """Parse a whole number. Raises ValueError if it is too large for a float."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _passed_others_code(error: Exception) -> bool:
    """Return whether the traceback contains code other than fitune's, torch's and Python's."""
    known = [
        Path(__file__).parent,
        *map(Path, sys.modules["torch"].__path__ if "torch" in sys.modules else ()),
    ]
    python = Path(sysconfig.get_path("stdlib"))
    for frame in traceback.extract_tb(error.__traceback__)[1:]:
        place = Path(frame.filename)
        of_python = place.is_relative_to(python) and "site-packages" not in place.parts
        if not (
            of_python or frame.filename.startswith("<") or any(map(place.is_relative_to, known))
        ):
            return True
    return False


def _first_line(error: BaseException) -> str:
    text = " ".join((str(error).strip().splitlines() or ["no more is said"])[0].split())
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}…"


def place_of(error: BaseException) -> str:
    """Return the innermost frame of the traceback as 'package/file.py:line'."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    path = Path(frames[-1].filename)
    parts = path.parts
    after = max(
        (number for number, part in enumerate(parts) if part in ("site-packages", "src")),
        default=len(parts) - 2,
    )
    return f"{'/'.join(parts[after + 1 :])}:{frames[-1].lineno}"
