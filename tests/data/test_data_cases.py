"""Rows as people have them, of which tests/cases/rows holds one file each: what is learned of the first of them."""

import gzip
import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from byte_tokenizer import byte_tokenizer
from fitune.config import DataConfig
from fitune.data.examples import Examples, load_examples
from fitune.errors import DataError

ROWS = Path(__file__).parents[1] / "cases" / "rows"
TEMPLATES = Path(__file__).parents[1] / "templates"
TOKENIZER = byte_tokenizer()
ASKED = "Question number 0, what is 0 plus 0?"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))


def load(
    path: Path | str, template: str | None = None, split: Any = "train", **keys: Any
) -> Examples:
    file = None if template is None else str(TEMPLATES / f"{template}.jinja")
    data = DataConfig(train=str(ROWS / path), template=file, **{"eval_fraction": 0, **keys})
    return load_examples(data, TOKENIZER, split=split)


def shown(examples: Examples) -> str:
    """The first row; ⟦what is learned⟧."""
    row = examples[0]
    parts = []
    for supervised, run in groupby(
        range(len(row)), key=lambda place: bool(row.loss_weights[place])
    ):
        part = TOKENIZER.decode(row.input_ids[list(run)])
        parts.append(f"⟦{part}⟧" if supervised else part)
    return "".join(parts)


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(
        f"<|im_start|>{role}\n"
        + (f"⟦{text}<|im_end|>\n⟧" if role == "assistant" else f"{text}<|im_end|>\n")
        for role, text in turns
    )


def pair(asked: str, said: str) -> str:
    return chatml(("user", asked), ("assistant", said))


MULTI = pair(ASKED, "The answer is 0.") + pair(
    "Question number 1, what is 1 plus 1?", "The answer is 2."
)


@pytest.mark.parametrize(
    ("name", "num_rows", "text"),
    [
        ("belle_human_assistant_caps.jsonl", 12, pair("q0", "a0")),
        ("caps_roles.jsonl", 12, pair("q0", "a0")),
        ("concatenated_pretty.json", 12, pair("q0", "a0")),
        ("consecutive_user.jsonl", 12, chatml(("user", "Hi.")) + pair(ASKED, "The answer is 0.")),
        ("crlf.jsonl", 12, pair(ASKED, "The answer is 0.")),
        ("dolly.jsonl", 12, pair("Who is number 0?\nNumber 0 is Ann.", "Ann.")),
        ("firefly.jsonl", 12, pair("0?", "0!")),
        ("gsm_question_answer.jsonl", 12, pair("0+0?", "0+0=0 #### 0")),
        ("input_output.jsonl", 12, pair("q0", "a0")),
        ("mistral_system_multi.jsonl", 12, chatml(("system", "Be brief.")) + MULTI),
        ("oasst_prompter.jsonl", 12, pair("q0", "The answer is 0.")),
        ("one_row.jsonl", 1, pair("Question number 1, what is 1 plus 1?", "The answer is 2.")),
        ("pandas_columns.json", 12, pair("Q0?", "A0.")),
        ("plain_multi.jsonl", 12, MULTI),
        ("prompt_response.jsonl", 12, pair("q0", "a0")),
        ("rows.jsonl.gz", 12, MULTI),
        ("saved_to_disk", 12, MULTI),
        (
            "single_object_pretty.json",
            1,
            pair("Question number 1, what is 1 plus 1?", "The answer is 2."),
        ),
        ("split_dir", 20, pair(ASKED, "The answer is 0.")),
        (
            "swift_query_response.jsonl",
            12,
            chatml(("system", "Be brief.")) + pair("hi", "hello") + pair("What is 0+0?", "0"),
        ),
        ("u2028.jsonl", 12, pair(ASKED, "line\u2028sep\x85 0")),
        ("vicuna_pairs.jsonl", 12, pair("q0", "a0") + pair("q", "a")),
        ("wrapped_data.json", 12, pair("q0", "a0")),
        ("wrapped_data_oneline.json", 12, pair("q0", "a0")),
    ],
)
def test_rows_of_this_shape_are_read_as_they_are_meant(name: str, num_rows: int, text: str) -> None:
    examples = load(name)
    assert (len(examples), shown(examples)) == (num_rows, text)


@pytest.mark.parametrize(
    ("name", "template", "text"),
    [
        (
            "consecutive_user.jsonl",
            "opens_after_user",
            f"<|user|>\nHi.<|end|>\n<|assistant|>\n<|user|>\n{ASKED}<|end|>\n<|assistant|>\n"
            "⟦The answer is 0.<|end|>\n⟧",
        ),
        (
            "mistral_system_multi.jsonl",
            "mistral_v3",
            f"<|endoftext|>[INST] {ASKED}[/INST]⟦ The answer is 0.<|im_end|>⟧[INST] Be brief.\n\n"
            "Question number 1, what is 1 plus 1?[/INST]⟦ The answer is 2.<|im_end|>⟧",
        ),
        (
            "deepseek_dict_args.jsonl",
            "string_arguments",
            f'<|endoftext|><U>{ASKED}<A>⟦<call>w {{"c": "Oslo"}}</call><|im_end|>⟧<T>3<A>⟦The answer is 0.<|im_end|>⟧',
        ),
        (
            "lf_reasoning_parts.jsonl",
            "qwen3",
            "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhmm\n</think>\n\n<tool_call>\n"
            '{"name": "w", "arguments": {"c": "Oslo"}}\n</tool_call><|im_end|>\n⟧<|im_start|>user\n<tool_response>\n3\n'
            "</tool_response><|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n3<|im_end|>\n⟧",
        ),
        (
            "think_inline_multi.jsonl",
            "qwen3",
            f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\nThe answer is 0.<|im_end|>\n"
            "<|im_start|>user\nQuestion number 1, what is 1 plus 1?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nadd\n</think>\n\nThe answer is 2.<|im_end|>\n⟧",
        ),
        (
            "plain_multi.jsonl",
            "no_end_of_turn",
            f"[gMASK]<sop><|user|>\n{ASKED}<|assistant|>\n⟦The answer is 0.⟧<|user|>\nQuestion number 1, what is "
            "1 plus 1?<|assistant|>\n⟦The answer is 2.<|im_end|>⟧",
        ),
    ],
)
def test_rows_are_learned_so_under_this_template(name: str, template: str, text: str) -> None:
    assert shown(load(name, template)) == text


def test_what_the_template_adds_or_drops_is_said_with_the_number_of_rows() -> None:
    warnings = load("think_inline_multi.jsonl", "glm45").report.warnings
    assert (
        "12 samples hold thinking in earlier turns, which the chat template leaves out there: those turns are not "
        "learned" in warnings
    )
    assert any(
        "12 samples end in an answer that the chat template does not end: <|im_end|> is added" in w
        for w in warnings
    )
    assert load("plain_multi.jsonl", "no_end_of_turn").report.ends == ("<|im_end|>",)


def test_a_long_prompt_before_the_answer_leaves_nothing_to_learn_when_it_is_cut() -> None:
    assert shown(load("long_prompt.jsonl", max_length=4096)).endswith(
        "0+0?<|im_end|>\n<|im_start|>assistant\n⟦ 0<|im_end|>\n⟧"
    )
    with pytest.raises(DataError, match="no supervised token left after the cut"):
        load("long_prompt.jsonl", max_length=64)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "kto_label.jsonl",
            "lines 1, 3, 5, 7, 9, 11: its 'label' is False, which marks its answer as a bad one",
        ),
        (
            "alpaca_gbk.csv",
            "not UTF-8: it may be in GBK, which 'iconv -f GB18030 -t UTF-8' writes in UTF-8",
        ),
        (
            "alpaca_utf16.jsonl",
            "is in UTF-16: write it in UTF-8, as 'iconv -f UTF-16 -t UTF-8' does",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_say_the_cause_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_key_that_refuses_a_row_can_be_left_out_of_account() -> None:
    assert len(load("kto_label.jsonl", ignore_keys=("label",))) == 12


def test_a_refused_system_message_is_said_once_with_the_setting_that_merges_it() -> None:
    with pytest.raises(DataError) as caught:
        load("mistral_system_multi.jsonl", "no_system")
    assert len(str(caught.value).splitlines()) == 2
    assert "data.system=merge" in str(caught.value)
    assert "user\nBe brief.\n\nQuestion number 0" in shown(
        load("mistral_system_multi.jsonl", "no_system", system="merge")
    )


def test_the_last_turn_alone_is_learned_with_mask_last() -> None:
    text = shown(load("plain_multi.jsonl", mask="last"))
    assert text == MULTI.replace("⟦The answer is 0.<|im_end|>\n⟧", "The answer is 0.<|im_end|>\n")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        ({"ask": "Q", "say": "A"}, {"prompt": "ask", "completion": "say"}, pair("Q", "A")),
        (
            {"ask": "Q", "say": "A", "about": "I", "you": "S"},
            {"prompt": "ask", "completion": "say", "input": "about", "system": "you"},
            chatml(("system", "S")) + pair("Q\nI", "A"),
        ),
        (
            {"talk": [{"who": "human", "what": "Q"}, {"who": "gpt", "what": "A"}]},
            {"messages": "talk", "role": "who", "content": "what"},
            pair("Q", "A"),
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"completion": "chosen"}, pair("Q", "A")),
        (
            {"messages": [{"role": "user", "content": "x"}], "ask": "Q", "say": "A"},
            {"prompt": "ask", "completion": "say"},
            pair("Q", "A"),
        ),
    ],
)
def test_columns_of_other_names_are_named(
    tmp_path: Path, row: object, columns: dict[str, str], text: str
) -> None:
    assert shown(load(write(tmp_path / "a.jsonl", row), columns=columns)) == text


def test_a_named_column_that_a_row_does_not_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"it has no 'ask', which data.columns names; its keys are question, answer"
    ):
        load(
            write(tmp_path / "a.jsonl", {"question": "Q", "answer": "A"}), columns={"prompt": "ask"}
        )


CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**CHAT, "rejected_response": "B"}, "'rejected_response' makes it a preference"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "data.columns.completion=chosen"),
        ({**CHAT, "images": ["a.png"]}, "'images' gives it pictures or sound"),
        ({**CHAT, "label": 0}, "its 'label' is 0"),
        ({**CHAT, "train_on_input": True}, "'train_on_input' says what of it is learned"),
        (
            {"ask": "Q", "say": "A"},
            "its keys (ask, say) fit no known format: data.columns names them",
        ),
        ({"question": "Q", "answer": ["A", "B"]}, "'answer' is a list of 2 answers, not one"),
        (
            {
                "messages": [
                    CHAT["messages"][0],
                    {"role": "assistant", "content": "A", "train_detail": [1]},
                ]
            },
            "has 'train_detail'",
        ),
    ],
)
def test_keys_that_change_the_meaning_of_a_row_refuse_it_with_the_way_out(
    tmp_path: Path, row: object, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", row))
    assert reason in str(caught.value)


def test_keys_that_mean_nothing_are_counted_and_harmless_ones_are_not_named(tmp_path: Path) -> None:
    rows = [{**CHAT, "id": 1, "source": "x", "label": True, "mood": "good"}, {**CHAT, "images": []}]
    warnings = load(write(tmp_path / "a.jsonl", *rows)).report.warnings
    assert sorted(warning for warning in warnings if "key" in warning) == [
        "1 samples hold the key 'label', which is ignored",
        "1 samples hold the key 'mood', which is ignored",
    ]


def test_splits_are_told_by_names_of_files_and_directories_as_datasets_does(tmp_path: Path) -> None:
    for number, name in enumerate(
        ("train/a.jsonl", "dev/a.jsonl", "my_test.jsonl", "readme.jsonl")
    ):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "d" / name, {"instruction": f"q{number}", "output": "a"})
    assert shown(load(tmp_path / "d")) == pair("q0", "a")
    held_out = load(tmp_path / "d", eval=str(tmp_path / "d"), split="eval")
    assert (len(held_out), shown(held_out)) == (1, pair("q1", "a"))
    assert [
        warning.split(" holds ")[1]
        for warning in load(tmp_path / "d").report.warnings
        if "split" in warning
    ] == [
        f"1 files of the split validation, not used for training: data.eval={tmp_path}/d evaluates with them",
        f"1 files of the split test, not used for training: data.eval={tmp_path}/d evaluates with them",
        "1 files whose names tell no split, not used for training",
    ]


def test_a_directory_of_test_files_alone_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", CHAT)
    with pytest.raises(DataError, match="holds no training data, only files of the split test"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json.zst", ".jsonl.bz2"])
def test_compressed_text_is_read(tmp_path: Path, suffix: str) -> None:
    lines = "\n".join(
        json.dumps({"instruction": f"q{number}", "output": "a"}) for number in range(3)
    )
    with pyarrow.output_stream(
        str(tmp_path / f"a{suffix}"),
        compression={".gz": "gzip", "zst": "zstd", "bz2": "bz2"}.get(suffix[-3:]),
    ) as file:
        file.write(lines.encode())
    assert len(load(tmp_path / f"a{suffix}")) == 3


def test_a_file_that_is_cut_off_in_its_compression_is_said(tmp_path: Path) -> None:
    whole = gzip.compress(
        b"".join(json.dumps({"text": f"{number:x}" * 9}).encode() + b"\n" for number in range(9999))
    )
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.jsonl.gz"):
        load(tmp_path / "a.jsonl.gz")


def test_arrow_files_that_datasets_keeps_for_itself_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(ROWS / "saved_to_disk", tmp_path / "d")
    shutil.copy(tmp_path / "d" / "data-00000-of-00001.arrow", tmp_path / "d" / "cache-1.arrow")
    assert len(load(tmp_path / "d")) == 12


@pytest.mark.parametrize(
    "content",
    [
        '{"rows": [{"instruction": "q0", "output": "a0"}], "version": 1}',
        '{"instruction": ["q0", "q1"], "output": ["a0", "a1"]}',
        '{"instruction": {"0": "q0"},\n "output": {"0": "a0"}}',
        '\n{\n"instruction": "q0",\n"output": "a0"}\n',
        '\ufeff{"train": [\n{"instruction": "q0", "output": "a0"}]}',
    ],
)
def test_json_in_these_forms_is_read(tmp_path: Path, content: str) -> None:
    (path := tmp_path / "a.json").write_text(content)
    assert shown(load(path)) == pair("q0", "a0")


def test_an_object_over_several_lines_that_is_broken_is_said_with_its_line(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_text(
        '{\n"instruction": "q",\n"output": "a"\n}\n{\n"instruction": "q"\n"output": "a"\n}\n'
    )
    with pytest.raises(DataError, match=r"a.json, line 7: broken JSON"):
        load(path)
