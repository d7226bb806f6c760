"""Make text from outside (data, names, files of a run) safe to print on a terminal.

A control character in such text could clear the screen, forge a line, or set the clipboard or the
title of the window. A character that changes the direction of writing could disguise a name. Each
is replaced by its Python escape (`\\x1b`, `\\u202e`).
"""

import json
import re

_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_DIRECTION = r"\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
_SURROGATE = r"\ud800-\udfff"  # cannot be encoded as UTF-8
_HOSTILE = re.compile(f"[{_CONTROL}{_DIRECTION}{_SURROGATE}]")
_HOSTILE_IN_LINE = re.compile(f"[\n\t{_CONTROL}{_DIRECTION}{_SURROGATE}]")


def printable(text: str) -> str:
    """Escape unsafe characters in `text`, except newlines and tabs."""
    return _HOSTILE.sub(_escaped, text)


def printable_line(text: str) -> str:
    """Escape unsafe characters in `text`, including newlines and tabs, for a single line."""
    return _HOSTILE_IN_LINE.sub(_escaped, text)


def json_text(content: object, *, indent: int | None = None) -> str:
    """Format data as JSON, with unsafe characters as JSON escapes.

    Raises ValueError for a number that is not finite.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    return _HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
