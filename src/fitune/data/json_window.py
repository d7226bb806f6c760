"""Parse JSON values from a text file of any length within bounded memory.

Only a window of the file is in memory. It holds the value that is being parsed and at most one
chunk of text beyond it.
"""

import json
import re
from typing import IO, Any

from fitune.boundary import bounded_int
from fitune.units import MIB

#: the longest value that is parsed, in characters
MAX_ELEMENT_CHARS = 64 * MIB
#: the characters that are read at a time
_CHUNK_CHARS = MIB
#: The characters that end a number. After any other one, and at the end of the window, the number
#: may go on in text that has not been read yet.
_AFTER_NUMBER = (",", "]", " ", "\t", "\r", "\n")


class BrokenJsonError(Exception):
    """Raised where the text at the window's position is not valid JSON; `line` counts from 1."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


_DECODER = json.JSONDecoder(parse_int=bounded_int)


class JsonWindow:
    """A window that moves forward over a text file and parses the JSON value at its position."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        #: the part of the file that is in memory
        self.text = ""
        #: where in `text` the next value begins
        self.position = 0
        #: the line of the file at the position, from 1
        self.line = 1

    def advance(self, position: int) -> None:
        """Move the position forward within `text` and count the lines that it passes."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def grow(self) -> bool:
        """Drop the text before the position and read on; return False at the end of the file.

        At least as much is read as remains, so repeated attempts to parse one long value take
        linear time.
        """
        left = self.text[self.position :]
        more = self.file.read(max(_CHUNK_CHARS, len(left)))
        self.text, self.position = left + more, 0
        return bool(more)

    def value(self) -> tuple[Any, int]:
        """Return the JSON value at the position, and the position behind it, without advancing.

        Raises BrokenJsonError if the text is not valid JSON or the value is longer than
        MAX_ELEMENT_CHARS.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                is_whole = (
                    isinstance(value, (dict, list, str))
                    or self.text[end : end + 1] in _AFTER_NUMBER
                )
                if is_whole or not self.grow():
                    return value, end
            except json.JSONDecodeError as error:
                line = self.line + self.text.count("\n", self.position, error.pos)
                reason = error.msg
                if len(self.text) - self.position > MAX_ELEMENT_CHARS or not self.grow():
                    raise BrokenJsonError(reason, line) from None
            except RecursionError:
                raise BrokenJsonError("nested too deeply", self.line) from None
            except ValueError as error:
                raise BrokenJsonError(str(error), self.line) from None

    def peek(self) -> str:
        """Advance past white space and return the next character, or '' at the end of the file."""
        while True:
            found = re.compile(r"[^ \t\r\n]").search(self.text, self.position)
            self.advance(found.start() if found else len(self.text))
            if found or not self.grow():
                return self.text[self.position : self.position + 1]
