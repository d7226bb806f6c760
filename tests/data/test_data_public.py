"""Rows, files and directories as public data sets have them: what is learned of them, or why they are refused."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_data_cases import chatml, load, pair, shown, write
from test_templates import TOOLS, encoder, supervised

from fitune.data.formats import normalise
from fitune.data.tokenise import Encoded, encode
from fitune.errors import DataError

USER, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TWO = pair("Q", "A") + pair("R", "B")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"conversation": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}]}, TWO),
        (
            {"conversation": [{"system": "S", "input": "Q", "output": "A"}]},
            chatml(("system", "S")) + pair("Q", "A"),
        ),
        (
            {"conversation": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}]},
            TWO,
        ),
        ({"conversations": ["Q", "A", "R", "B"]}, TWO),
        ({"problem": "Q", "solution": "A"}, pair("Q", "A")),
        ({"inputs": "Q", "targets": "A", "language": "en"}, pair("Q", "A")),
        ({"user": "Q", "assistant": "A"}, pair("Q", "A")),
        ({"Instruction": "Q", " Output ": "A"}, pair("Q", "A")),
        ({"prompt": [USER], "response": "A"}, pair("Q", "A")),
        ({"query": "R", "response": "B", "history": [USER, SAID]}, TWO),
        ({"messages": repr([USER, SAID])}, pair("Q", "A")),
        (
            {"messages": [{"role": "user", "text": "Q"}, {"role": "assistant", "text": "A"}]},
            pair("Q", "A"),
        ),
        ({"dialog": [USER, SAID]}, pair("Q", "A")),
        ({"messages": [{"role": "system", "content": None}, USER, SAID]}, pair("Q", "A")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
                    SAID,
                ]
            },
            pair("Q", "A"),
        ),
        ([USER, SAID], pair("Q", "A")),
        ({"question": "Q", "answer": ["A"]}, pair("Q", "A")),
        ({"instruction": "Q", "input": float("nan"), "output": "A"}, pair("Q", "A")),
    ],
)
def test_public_shapes_of_rows_are_read_as_they_are_meant(
    tmp_path: Path, row: object, text: str
) -> None:
    assert shown(load(write(tmp_path / "a.jsonl", row, row))) == text


@pytest.mark.parametrize(
    "flag",
    [
        {"training": False},
        {"trainable": False},
        {"loss_scale": 0},
        {"learn": False},
        {"masked": True},
        {"mask": True},
    ],
)
def test_a_message_that_another_tool_leaves_out_is_not_learned(
    tmp_path: Path, flag: dict[str, object]
) -> None:
    text = shown(
        load(write(tmp_path / "a.jsonl", {"messages": [USER, {**SAID, **flag}, USER, SAID]}))
    )
    assert text == pair("Q", "A").replace("⟦", "").replace("⟧", "") + pair("Q", "A")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [USER, SAID], "weight": 0.5},
            "'weight' is 0.5, which weighs the whole sample",
        ),
        ({"messages": [USER, SAID], "loss_scale": [0, 1]}, "which weighs the whole sample"),
        ({"prompt": "Q", "completion": "A", "desirable": False}, "its 'desirable' is False"),
        ({"prompt": "Q", "completion": "A", "is_correct": "no"}, "its 'is_correct' is no"),
        ({"prompt": "Q", "completion": "A", "label": "bad"}, "its 'label' is bad"),
        ({"messages": [USER, SAID], "kto_tag": False}, "its 'kto_tag' is False"),
        (
            {"question": "Q", "solution": "S", "answer": "4"},
            "it has several answers, 'answer' and 'solution': data.col",
        ),
        (
            {"instruction": "I", "question": "Q", "answer": "A"},
            "it has several questions, 'instruction' and 'question'",
        ),
        (
            {"prompt": "Q", "response": "A", "image_path": "a.png"},
            "'image_path' gives it pictures or sound",
        ),
        (
            {"messages": [{"speaker": "a", "text": "Q"}]},
            "its keys are speaker, text: data.columns.role=KEY",
        ),
        (
            {"messages": [{"role": "user", "said": "Q"}, SAID]},
            "its other keys are said: data.columns.content=KEY",
        ),
        ({"messages": [USER, {**SAID, "train": "false"}]}, "has train 'false'"),
    ],
)
def test_what_changes_the_meaning_of_a_row_refuses_it(
    tmp_path: Path, row: object, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", row))
    assert reason in str(caught.value)


def test_a_label_of_plain_text_is_of_a_class_and_refuses_nothing(tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "a.jsonl", {"text": "a film", "label": 0}))) == 1


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "think", "Complex_CoT"])
def test_a_column_of_reasoning_is_thought_before_the_answer(tmp_path: Path, key: str) -> None:
    row = (
        {"Question": "Q", key: "R", "Response": "A"}
        if key[0] == "C"
        else {"question": "Q", key: "R", "answer": "A"}
    )
    text = shown(load(write(tmp_path / "a.jsonl", row), "qwen3"))
    assert text.endswith("<|im_start|>assistant\n⟦<think>\nR\n</think>\n\nA<|im_end|>\n⟧")


def test_reasoning_that_the_answer_holds_already_is_not_thought_twice(tmp_path: Path) -> None:
    row = {"question": "Q", "reasoning": "R", "answer": "<think>\nR\n</think>\n\nA"}
    assert shown(load(write(tmp_path / "a.jsonl", row), "qwen3")).count("R") == 1


def test_what_a_row_gives_its_template_may_stand_beside_its_messages(tmp_path: Path) -> None:
    row = {"messages": [USER, SAID], "enable_thinking": False}
    assert shown(load(write(tmp_path / "a.jsonl", row), "qwen3")).endswith(
        "<think>\n\n</think>\n\n⟦A<|im_end|>\n⟧"
    )


def test_texts_in_which_a_conversation_is_written_out_are_told(tmp_path: Path) -> None:
    for text in (
        "### Human: Q### Assistant: A",
        "<s>[INST] Q [/INST] A </s>",
        "<|im_start|>user\nQ<|im_end|>\n",
    ):
        warnings = load(write(tmp_path / "a.jsonl", {"text": text})).report.warnings
        assert any(
            "every token of them is learned, the questions too" in warning for warning in warnings
        )


def test_many_keys_that_are_ignored_are_one_sentence(tmp_path: Path) -> None:
    row = {"messages": [USER, SAID], "mood": 1, "view": 2, "extra_a": 3}
    warnings = load(write(tmp_path / "a.jsonl", row)).report.warnings
    assert "1 samples hold the keys extra_a, mood, view, which are ignored" in warnings


def calls(*messages: dict[str, Any], name: str = "qwen25", tools: Any = TOOLS) -> list[str]:
    chat = normalise({"messages": [USER, *messages, SAID], "tools": tools})[1]
    result = encode(encoder(name), [chat])[0]
    return supervised(encoder(name), result)


CALL = {"name": "wind", "arguments": {"city": "Oslo"}}
WRITTEN = '<tool_call>\n{"name": "wind", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("key", ["parameters", "input", "args"])
def test_the_arguments_of_a_call_may_have_other_names(key: str) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "wind", key: {"city": "Oslo"}}],
    }
    assert calls(call, {"role": "tool", "content": "3"})[0] == f"{WRITTEN}<|im_end|>\n"


def test_calls_that_follow_each_other_are_said_in_one_turn() -> None:
    one, two = (
        {"role": "tool_call", "content": json.dumps({**CALL, "name": name})}
        for name in ("wind", "rain")
    )
    answers = [{"role": "tool_response", "content": "3"}] * 2
    both = f"{WRITTEN}\n{WRITTEN.replace('wind', 'rain')}<|im_end|>\n"
    assert calls(one, two, *answers)[0] == both
    said = {"role": "assistant", "content": "XY"}
    assert calls(said, one, two, *answers)[0] == f"XY\n{both}"


def test_parts_of_calls_and_of_their_results_are_read() -> None:
    call = {"type": "tool_use", "id": "1", "name": "wind", "input": {"city": "Oslo"}}
    result = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "1", "content": "3"}],
    }
    assert calls({"role": "assistant", "content": [call]}, result)[0] == f"{WRITTEN}<|im_end|>\n"


@pytest.mark.parametrize("content", [{"t": 3}, None, [{"name": "wind", "content": "3"}]])
def test_what_a_tool_answers_may_be_any_value(content: object) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert len(calls(call, {"role": "tool", "content": content})) == 2


@pytest.mark.parametrize("call_id", ["call_abcdefghijkl", None, "abcdefghi"])
def test_ids_of_calls_are_those_that_the_template_takes(call_id: str | None) -> None:
    """Mistral's takes nine letters and digits alone."""
    call = {"id": call_id, "type": "function", "function": CALL}
    said = calls(
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": call_id},
        name="mistral_v3",
    )
    written = said[0].rpartition('"id": "')[2].partition('"')[0]
    assert len(written) == 9
    assert written == call_id or call_id != "abcdefghi"


def test_a_call_without_arguments_has_none_in_a_template_of_texts() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "wind", "arguments": ""}]}
    assert "wind\n{}" in calls(call, {"role": "tool", "content": "3"}, name="deepseek_v3")[0]


def test_a_template_that_marks_answers_does_not_teach_an_empty_one_for_calls_that_it_does_not_write() -> (
    None
):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chat = normalise({"messages": [USER, call, {"role": "user", "content": "3"}, SAID]})[1]
    result = encode(encoder("generation"), [chat])[0]
    assert supervised(encoder("generation"), result) == ["A<|im_end|>"]
    assert isinstance(result, Encoded)
    assert any(
        "tool_calls, which the chat template does not show" in notice for notice in result.notices
    )


def test_a_template_that_marks_answers_and_knows_no_reasoning_teaches_all_of_them() -> None:
    thought = {**SAID, "reasoning_content": "YZ"}
    result = encode(
        encoder("generation"), [normalise({"messages": [USER, thought, USER, thought]})[1]]
    )[0]
    assert supervised(encoder("generation"), result) == ["A<|im_end|>"] * 2


ROW = {"instruction": "Q", "output": "A"}
LINES = json.dumps(ROW) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("a.tsv", "instruction\toutput\nQ\tA\n"),
        ("a.csv", "instruction;output\nQ;A\n"),
        ("a.csv", "instruction, output\nQ, A\n"),
        ("a.csv", "instruction,input,output\nQ,nan,A\n"),
        ("a.jsonl", f"\ufeff{LINES}\ufeff{LINES}"),
        ("a.json", json.dumps({"x": ROW, "y": ROW})),
        ("a.json", json.dumps({"data": {"rows": [ROW]}})),
        (
            "a.json",
            json.dumps({"columns": ["instruction", "output"], "index": [0], "data": [["Q", "A"]]}),
        ),
        ("a.jsonl", (json.dumps([USER, SAID]) + "\n") * 2),
        ("a.json", json.dumps([[USER, SAID]])),
        ("a.jsonl", json.dumps(LINES) + "\n"),
    ],
)
def test_files_of_these_forms_are_read(tmp_path: Path, name: str, content: str | bytes) -> None:
    (path := tmp_path / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    assert shown(load(path)) == pair("Q", "A")


def test_an_array_of_texts_is_plain_text(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_text('["some text"]')
    assert shown(load(path)) == "s⟦ome text<|im_end|>⟧"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"prompt,completion,prompt\nQ,A,B\n", "two columns are called 'prompt'"),
        (
            "a.json",
            json.dumps({"test": [ROW], "train": [ROW]}).encode(),
            "several lists of samples (test, train)",
        ),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS",
        ),
        ("a.json", '[{"instruction": "你好", "output": "好"}]'.encode("gbk"), "it may be in GBK"),
        ("a.jsonl", LINES.encode("utf-32"), "is in UTF-32"),
        (
            "a.csv",
            "instruction,output\ncafé,A\n".encode("latin-1"),
            "not UTF-8: save the file in UTF-8",
        ),
    ],
)
def test_files_that_cannot_be_read_say_the_cause(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert reason in str(caught.value)


def directory(root: Path, *names: str, card: str = "") -> Path:
    """Each file holds a row whose question is its name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        row = {"instruction": name, "output": "A"}
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), root / name)
        else:
            write(root / name, row)
    if card:
        (root / "README.md").write_text(f"---\n{card}\n---\n# Data\n")
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("traindata.jsonl", "testdata.jsonl", "valid2.jsonl", "dev1.jsonl"),
        ("myTrain.jsonl", "myTest.jsonl", "sftVal.jsonl"),
        ("sft.jsonl", "holdout.jsonl", "held_out.jsonl"),
        ("train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"),
        ("contest.jsonl", "x/eval_data.jsonl"),
    ],
)
def test_the_first_of_these_files_alone_is_for_training(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    examples = load(directory(tmp_path / "d", *names))
    assert (len(examples), shown(examples)) == (1, pair(names[0], "A"))


CARD = """configs:
- config_name: default
  data_files:
  - {split: train, path: good/*}
  - {split: test, path: bad.jsonl}"""
SEVERAL = """configs:
- {config_name: main, data_files: [{split: train, path: main/*}]}
- {config_name: socratic, data_files: [{split: train, path: socratic/*}]}"""


def test_a_readme_says_which_files_are_for_training(tmp_path: Path) -> None:
    root = directory(tmp_path / "d", "good/one.jsonl", "bad.jsonl", card=CARD)
    examples = load(root)
    assert (len(examples), shown(examples)) == (1, pair("good/one.jsonl", "A"))
    assert any(
        "1 files of the split test, not used for training" in warning
        for warning in examples.report.warnings
    )
    assert shown(load(root, eval=str(root), split="eval")) == pair("bad.jsonl", "A")


def test_of_several_data_sets_one_must_be_named(tmp_path: Path) -> None:
    root = directory(tmp_path / "d", "main/a.jsonl", "socratic/a.jsonl", card=SEVERAL)
    with pytest.raises(
        DataError, match=r"holds several data sets \(main, socratic\), as its README.md says"
    ):
        load(root)
    examples = load(f"{root}/main/*")
    assert shown(examples) == pair("main/a.jsonl", "A")


def test_of_several_splits_for_training_one_must_be_named(tmp_path: Path) -> None:
    names = [f"data/train_{kind}-00000-of-00001.parquet" for kind in ("sft", "gen")]
    root = directory(tmp_path / "d", *names)
    with pytest.raises(DataError, match=r"several splits for training \(train_gen, train_sft\)"):
        load(root)
    assert len(load(f"{root}/**/train_sft*")) == 1


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of that pattern"):
        load(f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize("name", ["falcon_instruct", "solar"])
def test_answers_that_nothing_ends_are_told_where_others_follow(name: str) -> None:
    chat = normalise(
        {"messages": [USER, {**SAID, "content": "X"}, USER, {**SAID, "content": "Y"}]}
    )[1]
    for result in encode(encoder(name), [chat, chat, chat]):
        assert isinstance(result, Encoded)
        assert any("learns to stop from the last one alone" in notice for notice in result.notices)
        assert result.ends == {"<eos>"}


@pytest.mark.parametrize(
    "call", ["strftime_now('%d %b %Y')", "strftime_now(form)", "strftime_now(format=form)"]
)
def test_a_template_writes_the_date_of_the_run_however_it_asks_for_it(
    call: str, tmp_path: Path
) -> None:
    (path := tmp_path / "a.jinja").write_text(
        "{% set form = '%d %b %Y' %}{{ "
        + call
        + " }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = write(tmp_path / "a.jsonl", {"messages": [USER, SAID]})
    found = [
        load(rows, str(path).removesuffix(".jinja"), date=date)
        for date in ("2026-01-31", "2026-02-01")
    ]
    assert [shown(examples)[:11] for examples in found] == ["31 Jan 2026", "01 Feb 2026"]
    assert [examples.report.date for examples in found] == ["2026-01-31", "2026-02-01"]
