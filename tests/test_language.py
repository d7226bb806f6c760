"""Every sentence that is said has its Chinese, with the same values in it."""

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from fitune.language import choose_language, pad, say
from fitune.language.chinese import CHINESE

SOURCE = Path(__file__).parent.parent / "src" / "fitune"


def said() -> Iterator[str]:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def values_in(sentence: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(sentence) if name)


def test_everything_said_has_its_chinese() -> None:
    assert [sentence for sentence in said() if sentence not in CHINESE] == []


@pytest.mark.parametrize("english", CHINESE)
def test_a_translation_names_the_same_values(english: str) -> None:
    assert values_in(CHINESE[english]) == values_in(english)


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "FITUNE_LANG": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "FITUNE_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
    ],
)
def test_the_language_is_that_of_fitune_lang_or_of_the_locale(environment: dict[str, str], language: str) -> None:
    assert choose_language(environment) == language


def test_what_has_no_translation_is_said_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert say("{left} of nothing known", left=3) == "3 of nothing known"


def test_a_chinese_character_takes_two_columns() -> None:
    assert pad("预算", 6) == "预算  "
