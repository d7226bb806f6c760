"""Text that somebody else wrote (data, names, files of a run) made fit for a terminal.

A control character among it could clear the screen, forge a line, set the clipboard or the window's title, and one that
turns the direction of writing could show a name as another. Each is shown as Python writes it (`\\x1b`, `\\u202e`).
"""

import json
import re
from typing import Any

_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_DIRECTION = r"\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
_SURROGATE = r"\ud800-\udfff"  # half a character, which no terminal's encoding has
_HOSTILE = re.compile(f"[{_CONTROL}{_DIRECTION}{_SURROGATE}]")
_HOSTILE_IN_LINE = re.compile(f"[\n\t{_CONTROL}{_DIRECTION}{_SURROGATE}]")


def printable(text: str) -> str:
    """Newlines and tabs stay."""
    return _HOSTILE.sub(_escaped, text)


def printable_line(text: str) -> str:
    """As `printable`, in one line: for a name, which has no newline of its own."""
    return _HOSTILE_IN_LINE.sub(_escaped, text)


def json_text(content: Any, *, indent: int | None = None) -> str:
    """The same data as JSON, which has an escape of its own for such characters. Raises ValueError for a number that is
    not finite."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    return _HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
