"""What is said to a person, in English or Chinese.

The English sentence stands in the code that says it and is the key of its translation (`chinese.py`), so that the code
reads by itself and a sentence without a translation is still said:

    say("yes, {left} left", left=format_bytes(left))

JSON and what is written into a run directory stay English: they are searched for, and read by programs. Sentences that
come from there, and errors, are translated as a whole when they are shown (`translated`); `sentences.py` holds those of
data, templates, configurations of other tools and logs, and an error that is not in it is shown in English.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

from rich.cells import cell_len

from fitune.language.chinese import CHINESE
from fitune.language.sentences import SENTENCES

Language = Literal["en", "zh"]


def choose_language(environment: Mapping[str, str] = os.environ) -> Language:
    """FITUNE_LANG, else the first of LC_ALL, LC_MESSAGES and LANG that is set; 'zh' where it begins so, else 'en'."""
    names = ("FITUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((value for name in names if (value := environment.get(name))), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


def say(english: str, **values: object) -> str:
    """`english` in the chosen language, with {names} replaced by `values`."""
    sentence = CHINESE.get(english, english) if choose_language() == "zh" else english
    return sentence.format(**values) if values else sentence


_VALUE = re.compile(r"\{(\w+)(:[nw])?\}")
_KINDS = {None: ".*?", ":n": "[0-9,]+", ":w": r"\S+"}
_MOST_NESTED = 6


def translated(sentence: str) -> str:
    """A whole sentence in the chosen language; what `sentences.py` does not know stays as it is."""
    if choose_language() != "zh":
        return sentence
    indent = sentence[: len(sentence) - len(sentence.lstrip(" "))]
    return indent + _in_chinese(sentence[len(indent) :], _MOST_NESTED)


def _in_chinese(sentence: str, nested: int) -> str:
    for pattern, chinese in _patterns():
        if (found := pattern.fullmatch(sentence)) is not None:
            for name, value in found.groupdict().items():
                if nested and (" " in value or value in SENTENCES):
                    value = _in_chinese(value, nested - 1)
                chinese = re.sub(rf"\{{{name}\}}", lambda _, value=value: value, chinese)  # type: ignore[misc]
            return chinese
    place = sentence.find(": ")  # what stands before a reason is a place or a name
    while nested and place >= 0:
        reason = _in_chinese(sentence[place + 2 :], 0)
        if reason != sentence[place + 2 :]:
            return f"{sentence[:place]}：{reason}"
        place = sentence.find(": ", place + 2)
    return sentence


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """The sentences with most words of their own first."""
    ordered = sorted(SENTENCES.items(), key=lambda pair: -len(_VALUE.sub("", pair[0])))
    return tuple((re.compile(_pattern(english), re.DOTALL), chinese) for english, chinese in ordered)


def _pattern(english: str) -> str:
    parts, position = [], 0
    for value in _VALUE.finditer(english):
        parts += [re.escape(english[position : value.start()]), f"(?P<{value[1]}>{_KINDS[value[2]]})"]
        position = value.end()
    return "".join((*parts, re.escape(english[position:])))


def pad(text: str, width: int) -> str:
    """`text` filled up to `width` columns of a terminal, in which a Chinese character takes two."""
    return text + " " * max(0, width - cell_len(text))
