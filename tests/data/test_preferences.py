"""Rows of preferences in the forms of TRL, LLaMA-Factory, UltraFeedback and HH-RLHF, and rows that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from byte_tokenizer import byte_tokenizer
from fitune.config import DataConfig
from fitune.data.examples import Examples, load_examples
from fitune.data.preferences import normalise_pair
from fitune.data.rows import Labelled
from fitune.errors import DataError

USER, GOOD, BAD = (
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so"},
    {"role": "assistant", "content": "no"},
)
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
FORMS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "why?", "chosen": "so", "rejected": "no"},
    "TRL, messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL without a prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "UltraFeedback": {
        "prompt": "why?", "prompt_id": "7", "chosen": [USER, GOOD], "rejected": [USER, BAD],
        "messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 2.5,
    },
    "LLaMA-Factory, alpaca": {"instruction": "why?", "input": "", "chosen": "so", "rejected": "no"},
    "LLaMA-Factory, sharegpt": {
        "conversations": [{"from": "human", "value": "why?"}],
        "chosen": {"from": "gpt", "value": "so"}, "rejected": {"from": "gpt", "value": "no"},
    },
    "JSON text": {"prompt": "why?", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
}  # fmt: skip
NONE: dict[str, tuple[dict[str, Any], str]] = {
    "one answer": ({"prompt": "a", "chosen": "b"}, "no 'rejected' answer"),
    "an answer to imitate": ({"messages": [USER, GOOD]}, "no 'chosen' answer"),
    "the same answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    "a number": ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is a number"),
    "a text and messages": ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "write both alike"),
    "other questions": ({"chosen": [USER, GOOD], "rejected": [EARLIER[0], BAD]}, "do not differ"),
    "answers alone": ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
}


def load(path: Path, rows: list[dict[str, Any]], **keys: Any) -> Examples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(path), eval_fraction=0, max_bad_fraction=1, **keys)
    return load_examples(data, byte_tokenizer(), kind="pair")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_pair(form: str) -> None:
    found, pair = normalise_pair(FORMS[form])
    assert found == "preference"
    for conversation, answer in zip(pair, (GOOD, BAD), strict=True):
        assert conversation.messages == (USER, answer)
        assert conversation.weights[0] in (None, 0)
        assert conversation.weights[1] is None
        assert not conversation.ignored


def test_only_answers_after_the_prompt_are_judged(tmp_path: Path) -> None:
    """An earlier answer that both conversations hold is a part of the prompt."""
    row = {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}
    tokenizer, (sample,) = byte_tokenizer(), load(tmp_path / "pairs.jsonl", [row])
    judged = [
        tokenizer.decode(ids[weights > 0]).strip().removesuffix("<|im_end|>")
        for ids, weights in sample.sequences()
    ]
    assert judged == ["so", "no"]
    assert sample.loss_weight == 1


def test_texts_are_judged_where_they_differ(tmp_path: Path) -> None:
    texts = {"chosen": "Human: why? Assistant: so", "rejected": "Human: why? Assistant: no"}
    tokenizer, (sample,) = byte_tokenizer(), load(tmp_path / "hh.jsonl", [texts])
    judged = [tokenizer.decode(ids[weights > 0]) for ids, weights in sample.sequences()]
    assert [text[:2] for text in judged] == ["so", "no"]


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_pair_is_left_out_with_the_reason(tmp_path: Path, form: str) -> None:
    row, reason = NONE[form]
    examples = load(tmp_path / "pairs.jsonl", [FORMS["TRL, texts"], row])
    assert len(examples) == 1
    (bad,) = examples.report.bad_rows
    assert reason in bad.reason


def test_each_sequence_is_cut_and_a_pair_without_an_answer_goes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p" * 100, "chosen": "so", "rejected": "no"},
        {"prompt": "why", "chosen": "s" * 100, "rejected": "no"},
    ]
    examples = load(tmp_path / "pairs.jsonl", rows, max_length=64)
    (sample,) = examples
    assert sample.sequence_lengths[0] == 64
    assert sample.sequence_lengths[1] < 64
    assert "no supervised token left" in examples.report.dropped_rows[0].reason


def test_columns_name_the_answers(tmp_path: Path) -> None:
    row = {"q": "why?", "better": "so", "worse": "no", "other": 1}
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    assert len(load(tmp_path / "pairs.jsonl", [row], columns=columns)) == 1


def test_a_pair_needs_its_objective(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS["TRL, texts"]) + "\n")
    with pytest.raises(DataError, match="objective=dpo on both answers"):
        load_examples(DataConfig(train=str(path)), byte_tokenizer())


def test_rows_of_labelled_answers_of_other_tools_are_read(tmp_path: Path) -> None:
    """Only the last answer is judged, whatever form it has."""
    rows: tuple[dict[str, Any], ...] = (
        {"prompt": "ask", "completion": "told", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": "false"},
        {"messages": [*EARLIER, USER, GOOD], "kto_tag": 0},
        {"instruction": "ask", "input": "more", "output": "told", "kto_tag": True},
    )
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = DataConfig(train=str(path), eval_fraction=0)
        (sample,) = load_examples(data, byte_tokenizer(), kind="labelled")
        assert isinstance(sample.judged, Labelled)
        assert sample.judged.is_desirable is (number in (0, 3))
        judged = byte_tokenizer().decode(sample.input_ids[sample.loss_weights > 0])
        assert judged.startswith("told" if number in (0, 3) else str(GOOD["content"])), judged
        assert sample.loss_weight == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "it has no 'label' that says whether its answer is desirable"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "its 'label' is maybe, not true or false"),
        ({"text": "a b", "label": True}, "it is a text without a prompt"),
    ],
)  # fmt: skip
def test_rows_without_a_label_or_a_prompt_are_named(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=reason):
        load_examples(DataConfig(train=str(path)), byte_tokenizer(), kind="labelled")
