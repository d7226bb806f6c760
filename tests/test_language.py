"""Every sentence that is said has its Chinese, with the same values in it."""

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from fitune.config.foreign_reasons import ANSWERS, NOT_NEEDED, OTHER_TRAINING
from fitune.language import choose_language, pad, say, translated
from fitune.language.chinese import CHINESE
from fitune.language.sentences import SENTENCES

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


REFUSING = (
    *("data/messages", "data/keys", "data/formats", "data/files", "data/splits", "data/examples", "data/tokenise"),
    *("data/turns", "data/chat_template", "report/foreign", "config/foreign_read", "config/foreign_data"),
    *("config/foreign_translate", "cli/config_command"),
)
_RAISED = ("RowError", "DataError", "ConfigError", "TemplateError", "RunDirectoryError", "UsageError", "ModelError")


def written(node: ast.expr) -> str | None:
    """A sentence as it may come out, each value in it a 3; None for what is no text here."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "3" for part in node.values)
    return None


def refusals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = ast.unparse(node.func)
        if name in _RAISED or owner == "draft.differs.append":
            first = node.args[0]
            yield from filter(None, map(written, first.elts if isinstance(first, ast.List) else [first]))
        elif name == "refuse":
            yield from filter(None, [written(node.args[1])])


@pytest.mark.parametrize("module", REFUSING)
def test_every_refusal_of_data_configurations_and_logs_has_its_chinese(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    found = list(refusals(SOURCE / f"{module}.py"))
    assert found
    lines = [line for sentence in found for line in sentence.splitlines() if len(re.findall("[A-Za-z]{2,}", line)) > 2]
    assert [line for line in lines if translated(line) == line] == []


def test_every_reason_of_an_import_has_its_chinese() -> None:
    reasons = {*(reason for _, reason in OTHER_TRAINING.values()), *ANSWERS.values()}
    reasons |= {reason for reason in NOT_NEEDED.values() if "it has an effect only with" not in reason}
    assert sorted(reasons - SENTENCES.keys()) == []


@pytest.mark.parametrize("english", SENTENCES)
def test_a_whole_sentence_has_the_same_values_and_is_translated(english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values_in(SENTENCES[english]) == values_in(english)
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert any("\u4e00" <= letter <= "\u9fff" for letter in translated(re.sub(r"\{\w+(:[nw])?\}", "3", english)))


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("12 rows hold the key 'mood', which is ignored", "12 个样本含有键 'mood'，已忽略"),
        (
            "  a.jsonl, lines 1, 3: its 'label' is False, which marks its answer as a bad one (KTO): leave the key "
            "out, or name it in data.ignore_keys to train on the row all the same",
            "  a.jsonl 第 1, 3 行：它的 'label' 为 False，表示这是不好的回答（KTO）："
            "请去掉这个键，或写进 data.ignore_keys 以照样训练该样本",
        ),
        (
            "sft.yaml:3 rl: 'dpo': fitune is for supervised fine-tuning alone",
            "sft.yaml:3 rl: 'dpo'：fitune 只做监督微调",
        ),
        (
            "  infer_dtype: it is of generating, or of an evaluation other than the loss",
            "  infer_dtype：它关于生成，或损失以外的评估",
        ),
        ("a sentence that nobody knows", "a sentence that nobody knows"),
    ],
)
def test_a_sentence_is_translated_with_what_stands_in_it(
    english: str, chinese: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert translated(english) == chinese
    monkeypatch.setenv("FITUNE_LANG", "en")
    assert translated(english) == english
