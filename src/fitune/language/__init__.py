"""What is said to a person, in English or Chinese.

The English sentence stands in the code that says it and is the key of its translation (`chinese.py`), so that the code
reads by itself and a sentence without a translation is still said:

    say("yes, {left} left", left=format_bytes(left))

JSON and what is written into a run directory stay English: they are searched for, and read by programs. Sentences that
come from there, errors, notes and help texts are translated as a whole when they are shown (`translated`);
`sentences.py` holds them, and what is not in it (the words of another library) is shown in English.
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
    """Each line of it in the chosen language; what `sentences.py` does not know stays as it is."""
    if choose_language() != "zh":
        return sentence
    return "\n".join(map(_line_in_chinese, sentence.split("\n")))


def _line_in_chinese(line: str) -> str:
    if not line.startswith("  ") and (whole := _in_chinese(line, _MOST_NESTED)) != line:
        return whole
    sentence = line.lstrip(" ")
    if sentence in CHINESE:
        return line.replace(sentence, CHINESE[sentence])
    return line[: len(line) - len(sentence)] + _in_chinese(sentence, _MOST_NESTED)


def _in_chinese(sentence: str, nested: int) -> str:
    for words, english, chinese in _sentences():
        if words in sentence and (found := _pattern(english).fullmatch(sentence)) is not None:
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
    for between, in_chinese in (("; ", "；"), (" or ", " 或 ")):
        if nested and len(clauses := sentence.split(between)) > 1:
            told = [_in_chinese(clause, nested - 1) for clause in clauses]
            return sentence if told == clauses else in_chinese.join(told)
    if nested and len(items := sentence.split(", ")) > 1:
        told = [_in_chinese(item, nested - 1) for item in items]
        return sentence if any(map(str.__eq__, told, items)) else "，".join(told)
    return sentence


@cache
def _sentences() -> tuple[tuple[str, str, str], ...]:
    """(the longest words of it that stand in every such sentence, English, Chinese), those with most words of their own
    first."""
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
    """`text` filled up to `width` columns of a terminal, in which a Chinese character takes two."""
    return text + " " * max(0, width - cell_len(text))
