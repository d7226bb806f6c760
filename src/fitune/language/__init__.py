"""Show messages to the user in English or Chinese.

The code that shows a message contains its English text, which is the key of the Chinese translation
(`chinese.py`). A message without a translation is shown in English:

    say("yes, {left} left", left=format_bytes(left))

JSON and the files of a run directory stay English, because users search them and programs read
them. Messages from these files, errors, notes and help texts are translated as a whole when they
are shown (`translated`). `sentences.py` holds their translations; text that it does not hold, such
as an error of another library, is shown in English.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

from fitune.language.chinese import CHINESE
from fitune.language.counts import agree_with_counts
from fitune.language.sentences import SENTENCES

Language = Literal["en", "zh"]
#: of the request that is answered, where each may ask for its own
_spoken: ContextVar[Language | None] = ContextVar("language", default=None)


@contextmanager
def speaking(language: Language | None) -> Iterator[None]:
    """Use this language inside of the block, None for that of the environment."""
    before = _spoken.set(language)
    try:
        yield
    finally:
        _spoken.reset(before)


def choose_language(environment: Mapping[str, str] = os.environ) -> Language:
    """Return 'zh' or 'en' by the first of FITUNE_LANG, LC_ALL, LC_MESSAGES and LANG that is set.

    A value that begins with 'zh' selects Chinese. Inside of `speaking`, its language counts.
    """
    if (spoken := _spoken.get()) is not None:
        return spoken
    names = ("FITUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((value for name in names if (value := environment.get(name))), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


def say(english: str, **values: object) -> str:
    """Translate `english` to the chosen language and replace its {names} by `values`."""
    if choose_language() != "zh":
        return agree_with_counts(english.format(**values)) if values else english
    message = CHINESE.get(english, english)
    return message.format(**values) if values else message


_VALUE = re.compile(r"\{(\w+)(:[nw])?\}")
_KINDS = {None: ".*?", ":n": "[0-9,]+", ":w": r"\S+"}
_MAX_NESTING = 6


def translated(message: str) -> str:
    """Translate each line of a text. A line that `sentences.py` does not hold stays English."""
    if choose_language() != "zh":
        return agree_with_counts(message)
    return "\n".join(map(_line_in_chinese, message.split("\n")))


def _line_in_chinese(line: str) -> str:
    if not line.startswith("  ") and (whole := _in_chinese(line, _MAX_NESTING)) != line:
        return whole
    message = line.lstrip(" ")
    if message in CHINESE:
        return line.replace(message, CHINESE[message])
    return line[: len(line) - len(message)] + _in_chinese(message, _MAX_NESTING)


def _in_chinese(message: str, nested: int) -> str:
    for fixed_part, english, chinese in _patterns():
        if fixed_part in message and (found := _pattern(english).fullmatch(message)) is not None:
            for name, value in found.groupdict().items():
                if nested and (" " in value or value in SENTENCES):
                    value = _in_chinese(value, nested - 1)
                chinese = re.sub(rf"\{{{name}\}}", lambda _, value=value: value, chinese)  # type: ignore[misc]
            return chinese
    # The text before a colon may be a file position or a name, which is not translated.
    place = message.find(": ")
    while nested and place >= 0:
        reason = _in_chinese(message[place + 2 :], 0)
        if reason != message[place + 2 :]:
            return f"{message[:place]}：{reason}"
        place = message.find(": ", place + 2)
    for between, in_chinese in (("; ", "；"), (" or ", " 或 ")):
        if nested and len(clauses := message.split(between)) > 1:
            translations = [_in_chinese(clause, nested - 1) for clause in clauses]
            return message if translations == clauses else in_chinese.join(translations)
    if nested and len(items := message.split(", ")) > 1:
        translations = [_in_chinese(item, nested - 1) for item in items]
        return message if any(map(str.__eq__, translations, items)) else "，".join(translations)
    return message


@cache
def _patterns() -> tuple[tuple[str, str, str], ...]:
    """Return (longest fixed part, English pattern, Chinese) of each message, most specific first.

    A text can match a pattern only if it contains the fixed part, which is faster to test.
    """
    ordered = sorted(SENTENCES.items(), key=lambda pair: -len(_VALUE.sub("", pair[0])))
    return tuple(
        (max(_VALUE.sub("\n", english).split("\n"), key=len), english, chinese)
        for english, chinese in ordered
    )


@cache
def _pattern(english: str) -> re.Pattern[str]:
    parts, position = [], 0
    for value in _VALUE.finditer(english):
        parts += [
            re.escape(english[position : value.start()]),
            f"(?P<{value[1]}>{_KINDS[value[2]]})",
        ]
        position = value.end()
    return re.compile("".join((*parts, re.escape(english[position:]))), re.DOTALL)


def pad(text: str, width: int) -> str:
    """Pad `text` to `width` columns of a terminal, where a Chinese character takes two columns."""
    # a recording in another program's environment has messages, but no rich
    from rich.cells import cell_len

    return text + " " * max(0, width - cell_len(text))
