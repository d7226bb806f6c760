"""Every sentence that is said has its Chinese, with the same values in it."""

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import fitune.cli.config_command  # noqa: F401 (its help is made when it is imported, in English for other tests)
from fitune.cli.app import main
from fitune.config.importers.reasons import ANSWERS, NOT_NEEDED, OTHER_TRAINING
from fitune.language import choose_language, pad, say, translated
from fitune.language.chinese import CHINESE
from fitune.language.sentences import SENTENCES

SOURCE = Path(__file__).parent.parent / "src" / "fitune"


def said() -> Iterator[str]:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "say"
            ):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def values_in(sentence: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(sentence) if name)


def test_everything_said_has_its_chinese() -> None:
    assert [sentence for sentence in said() if sentence not in CHINESE] == []


def test_a_translation_names_the_same_values() -> None:
    assert [
        english for english in CHINESE if values_in(CHINESE[english]) != values_in(english)
    ] == []


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
def test_the_language_is_that_of_fitune_lang_or_of_the_locale(
    environment: dict[str, str], language: str
) -> None:
    assert choose_language(environment) == language


def test_what_has_no_translation_is_said_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert say("{left} of nothing known", left=3) == "3 of nothing known"


def test_a_chinese_character_takes_two_columns() -> None:
    assert pad("预算", 6) == "预算  "


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (
            "1 samples hold the key 'mood', which is ignored",
            "1 sample holds the key 'mood', which is ignored",
        ),
        (
            "1 samples of data.train are in data.eval too",
            "1 sample of data.train is in data.eval too",
        ),
        ("1 training samples are copies of others", "1 training sample is a copy of others"),
        ("finished after 1 steps, 1,021 tokens", "finished after 1 step, 1,021 tokens"),
        (
            "batch 1 x 1 samples, 21 samples, 0.1 samples",
            "batch 1 x 1 sample, 21 samples, 0.1 samples",
        ),
        ("learned  ⟦in 1 steps⟧ in the first sample", "learned  ⟦in 1 steps⟧ in the first sample"),
        ("a.jsonl/1 samples.jsonl: 1 steps.", "a.jsonl/1 samples.jsonl: 1 step."),
    ],
)
def test_a_count_of_one_is_in_the_singular(
    written: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "en")
    assert translated(written) == shown
    assert say("{count} samples", count=1) == "1 sample"


ENGLISH_ALONE = {
    "config/importers/tools.py": "names of other tools' files and keys",
    "allocator/rules.py": "PyTorch's own words for an allocation that fails",
    "board/offline.py": "HTML",
    "report/model_card.py": "a file of an export, which is English as those of a run are",
    "model/ollama.py": "a file of an export",
    "recorder/as_real.py": "PyTorch's own words",
    "language": "the catalogue, and the grammar of counts",
}
"""What holds English sentences that no user of the commands is shown by fitune, and why."""
_SENTENCE = re.compile(r"[A-Za-z']+[,:;]? [A-Za-z']+[,:;]? [A-Za-z']+")
NOT_SAID = (
    r"fitune [a-z]+( |$)|module '|what is bioinformatics|pip install ",  # commands, a name, the demo's question
    r"[^ ]\|[^ ]|^[\w.]+( [\w.]+)*_[\w.]+( [\w.]+)*$|\w+_\w+ \w+_\w+",  # regular expressions, lists of keys
    r"of at (least|most)$|unknown escape character|Detected pickle protocol|dummy base class",  # parts, others' words
    r"Korthikanti et al\. 2022|Total (train batch size|optimization steps)|limits of the block",  # names
    r"^3 of 3 \(3 tokens with padding\)$",  # a sentence that begins with values
    r"keys did not match$",  # words of peft
    r"^default-src 'none'",  # a browser's content security policy
    r"Tried to allocate 3$|total capacity of 3|memory in use$|(allocated|but unallocated|in total) ?(by PyTorch)?$",
    # words of PyTorch, which are read
    r"as the script lets them be|is the longest answer\?$|^from fitune",  # samples of a file that is not there; code
)


def literals(node: ast.AST) -> Iterator[str]:
    """Every text in the code that is not a docstring, as it may come out: each value in it is a 3."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "3" for part in child.values
            )
            for part in child.values:
                if isinstance(part, ast.FormattedValue):
                    yield from literals(part)
        elif isinstance(child, ast.Constant):
            if isinstance(child.value, str):
                yield child.value
        else:
            yield from literals(child)


def module(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def sentences(path: Path) -> Iterator[str]:
    for text in literals(ast.parse(path.read_text())):
        yield from (
            line for line in text.splitlines() if _SENTENCE.search(line) and "<" not in line
        )


def test_every_sentence_of_the_code_has_its_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    missing = [
        (module(path), line)
        for path in sorted(SOURCE.rglob("*.py"))
        if not module(path).startswith(tuple(ENGLISH_ALONE))
        for line in sentences(path)
        if line not in CHINESE and translated(line) == line
    ]
    assert [line for line in missing if not re.search("|".join(NOT_SAID), line[1])] == []


def test_every_reason_of_an_import_has_its_chinese() -> None:
    reasons = {*(reason for _, reason in OTHER_TRAINING.values()), *ANSWERS.values()}
    reasons |= {
        reason for reason in NOT_NEEDED.values() if "it has an effect only with" not in reason
    }
    assert sorted(reasons - SENTENCES.keys()) == []


def test_a_whole_sentence_has_the_same_values_and_is_translated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert [
        english for english in SENTENCES if values_in(SENTENCES[english]) != values_in(english)
    ] == []
    assert [
        english
        for english in SENTENCES
        if not re.search("[\u4e00-\u9fff]", translated(re.sub(r"\{\w+(:[nw])?\}", "3", english)))
    ] == []


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("12 samples hold the key 'mood', which is ignored", "12 个样本含有键 'mood'，已忽略"),
        (
            "  a.jsonl, lines 1, 3: its 'label' is False, which marks its answer as a bad one (KTO): leave the key "
            "out, or name it in data.ignore_keys to train on the sample all the same",
            "  a.jsonl 第 1, 3 行：它的 'label' 为 False，表示这是不好的回答（KTO）："
            "请去掉这个键，或写进 data.ignore_keys 以照样训练该样本",
        ),
        (
            "sft.yaml:3 rl: 'grpo': only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported",
            "sft.yaml:3 rl: 'grpo'：只导入监督微调、DPO、SimPO、ORPO 与 KTO",
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


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (
            "       7 parameters, 7 trained, on cpu · 59 samples, 878 tokens, 36.6% supervised · 1 samples held out",
            "参数",
        ),
        ("note   precision float32: a CPU", "提示   精度 float32：在 CPU 上"),
        (
            "no plan fits 2.0 GiB on RTX 4090: the closest candidate (micro-batch 1, accumulation 8, gradient "
            "checkpointing full) needs 3.0 GiB (activation 2.0 GiB, parameter 0.5 GiB). Try model.method=lora "
            "(1.0 GiB) or a smaller model",
            "激活 2.0 GiB，参数 0.5 GiB",
        ),
        (
            "out of memory in the forward of 3 samples (96 tokens with padding), 1.0 GiB at once were missing: split "
            "into micro-batches of at most 48 tokens with padding; no sample is lost",
            "3 个样本的前向（96 个 token，含填充）时爆显存（OOM），一次差 1.0 GiB："
            "拆成至多 48 个 token（含填充）的微批；没有丢失样本",
        ),
        (
            "memory of step 2: resident 27.5 MiB predicted, 6.8 MiB measured (differences below 32.0 MiB are the "
            "program's own)",
            "第 2 步的预测与实测：常驻内存预测 27.5 MiB，实测 6.8 MiB（32.0 MiB 以内的差别来自程序本身）",
        ),
        (
            "memory 27.5 MiB for the model and its steps, 546.0 MiB with Python and its libraries, predicted for step "
            "2, where it will be measured",
            "预测   模型和训练步用内存 27.5 MiB，连同 Python 和各个库共 546.0 MiB；到第 2 步时实测",
        ),
        (
            "warning: more than 5% off: memory of step 2: reserved 2.0 GiB predicted, 1.0 GiB measured (+9.9%)",
            "已保留",
        ),
        (
            "--apply 9 is none of the candidates: give 0 to 4",
            "--apply 9 不是候选的编号：请给 0 到 4",
        ),
    ],
)
def test_a_sentence_of_a_run_is_translated_to_its_last_word(
    english: str, chinese: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    told = translated(english)
    assert chinese in told
    assert not re.search(r"\b(rows?|of|the|samples|predicted|or|at)\b", told)


@pytest.mark.parametrize("verb", ["", "env", "check", "plan", "plan-script", "train", "sweep", "watch", "board", "runs",
                                  "compare", "advise", "report", "chat", "export", "demo", "config",
                                  "config import"])  # fmt: skip
def test_the_help_of_every_verb_is_in_chinese(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out.partition("fitune VERB --help")[0]
    assert "用法：" in shown
    words = re.sub(r"(?m)^(Examples:|  fitune .*|A verb's own help:.*)$|用法：[^╭]*\n", "", shown)
    assert not re.search(r"\b[a-z]+ [a-z]+ [a-z]+\b", words)


def test_errors_of_the_command_line_are_in_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    for arguments in (
        ["trin"],
        ["train", "--foo"],
        ["train", "--batch"],
        ["check", "--show", "x"],
        ["compare"],
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("错误：")
        assert not re.search(r"[a-z]+ [a-z]+ [a-z]+", told)


DOCUMENTS = [
    *sorted((SOURCE.parent.parent / "docs").glob("*.zh.md")),
    SOURCE.parent.parent / "README_zh.md",
]
OTHER_WORDS = {
    "词元": "token",
    "(?<!梯度)(?<!度)重算": "梯度检查点（激活重计算）",
    "激活检查点|梯度检查站": "梯度检查点",
    "微批量": "微批",
    "批量大小|有效批量|小批量": "批大小",
    "梯度积累|梯度累计": "梯度累积",
    "显卡内存|GPU 内存|内存上限|内存溢出|内存峰值|峰值内存|设备内存": "显存",
    "留出行|训练行|数据行|行长|几行|样本行|该行": "样本",
    "学习速率": "学习率",
    "令牌": "token",
    "打包后的批量": "拼接",
}
"""What is not said in Chinese, and what is said instead (docs/glossary.zh.md)."""
OTHER_ENGLISH = {
    r"\brows?\b": "samples",
    r"\bdeals?\b|\bdealt\b": "shards, divides",
    r"(?<!memory\.)\bbudgets?\b": "memory limit",
    r"\bpieces of at most\b|\bpositions at a time\b|\(\{positions\S* positions": "micro-batches, tokens with padding",
    r"\bladder\b|\brungs?\b|\brelief\b|\bbirths?\b|\bquantum\b": "words of the code alone",
    r"rematerialisation|(?:activation )?recomputation|recomputing": "gradient checkpointing",
    r"\bmini-?batch|\bmicrobatch": "micro-batch",
    r"\bframebuffer\b|\bvideo memory\b|\bVRAM\b": "memory",
}
"""What is not said in English, and what is said instead (docs/glossary.md)."""
SAID_ALL_THE_SAME = (
    r"steps in a row|embedding of \{\w+\} rows|rows of (embedding and head|new tokens)|of 64 rows"
)
PAGES_FOR_USERS = ("README.md", *(f"docs/{name}.md" for name in (
    "batch_size", "data", "first_minute", "from_other_tools", "glossary", "llama_factory", "minimind", "mirrors", "oom",
    "scripts", "speed", "tutorial", "watch",
)))  # fmt: skip


@pytest.mark.parametrize("wrong", OTHER_WORDS)
def test_the_words_are_those_of_the_glossary(wrong: str) -> None:
    shown = [*CHINESE.values(), *SENTENCES.values()]
    shown += [line for page in DOCUMENTS for line in page.read_text(encoding="utf-8").splitlines()]
    assert [line for line in shown if re.search(wrong, line)] == []


@pytest.mark.parametrize("wrong", OTHER_ENGLISH)
def test_the_english_words_are_those_of_the_glossary(wrong: str) -> None:
    """Messages, screens and help texts, all of which are in the catalogue; what {stands} in them is no word."""
    said = [re.sub(SAID_ALL_THE_SAME, "", english) for english in (*CHINESE, *SENTENCES)]
    bare = [re.sub(r"\{(?!positions)\w+(:[nw])?\}", "{}", english) for english in said]
    assert [english for english in bare if re.search(wrong, english, re.IGNORECASE)] == []


@pytest.mark.parametrize("page", PAGES_FOR_USERS)
def test_the_words_of_a_page_are_those_of_the_glossary(page: str) -> None:
    prose = re.sub(
        r"```.*?```|`[^`\n]*`|(?m:^    .*$)",
        "",
        (SOURCE.parent.parent / page).read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    wrong = re.compile("|".join(OTHER_ENGLISH), re.IGNORECASE)
    assert [line for line in prose.splitlines() if wrong.search(line)] == []


def test_the_glossary_is_the_same_in_both_languages() -> None:
    rows = {}
    for name in ("glossary.md", "glossary.zh.md"):
        lines = (SOURCE.parent.parent / "docs" / name).read_text(encoding="utf-8").splitlines()
        rows[name] = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in lines
            if line.startswith("| ")
        ][1:]
    assert [row[:2] for row in rows["glossary.md"]] == [
        row[1::-1] for row in rows["glossary.zh.md"]
    ]
    said = "".join((*CHINESE.values(), *SENTENCES.values()))
    assert [row[1] for row in rows["glossary.md"] if row[1].split("（")[0] not in said] == []
