"""What is said to a person, in English or Chinese.

The English sentence stands in the code that says it and is the key of its translation (`chinese.py`), so that the code
reads by itself and a sentence without a translation is still said:

    say("yes, {left} left", left=format_bytes(left))

Errors, JSON and what is written into a run directory stay English: they are searched for, and read by programs.
"""

import os
from collections.abc import Mapping
from typing import Literal

from rich.cells import cell_len

from fitune.language.chinese import CHINESE

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


def pad(text: str, width: int) -> str:
    """`text` filled up to `width` columns of a terminal, in which a Chinese character takes two."""
    return text + " " * max(0, width - cell_len(text))
