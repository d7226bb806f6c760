"""Plain texts for pre-training: split or joined without a lost target, refused where they are no texts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byte_tokenizer import byte_tokenizer
from fitune.config import DataConfig, read_config
from fitune.data.cut import split_ids
from fitune.data.examples import Examples, load_examples
from fitune.data.packing import split
from fitune.data.rows import Batch, Row
from fitune.errors import ConfigError, DataError
from fitune.step.work import train_step
from tiny_steps import Capture, distance, make_model, settings_for

TOKENIZER = byte_tokenizer()
LONG, SHORT = "abcdefghijklmnopqrstuvwxyz", "0123"
END = "<|im_end|>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))


def write(path: Path, texts: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(path: Path, *, tokenizer: Any = TOKENIZER, **keys: Any) -> Examples:
    data = {"train": str(path), "eval_fraction": 0, "max_length": 10, **keys}
    return load_examples(DataConfig(**data), tokenizer)


def said(examples: Examples) -> list[str]:
    return [TOKENIZER.decode(row.input_ids) for row in examples]


def targets(examples: Examples) -> str:
    return "".join(TOKENIZER.decode(row.input_ids[row.loss_weights > 0]) for row in examples)


def test_a_long_text_is_split_and_each_of_its_tokens_is_a_target_once(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", [LONG, SHORT]), too_long="split")
    assert said(examples) == ["abcdefghij", "jklmnopqrs", f"stuvwxyz{END}", SHORT + END]
    assert targets(examples) == LONG[1:] + END + SHORT[1:] + END
    train = examples.report.train
    assert (train.num_long_rows, train.num_duplicate_rows) == (1, 0)
    assert train.quantiles is not None
    assert train.quantiles.max_tokens == len(LONG) + 1


def test_joined_texts_fill_every_sample_and_cross_their_borders(
    tmp_path: Path,
) -> None:
    examples = load(write(tmp_path / "a.jsonl", [SHORT, LONG, SHORT]), wrapped=True)
    whole = SHORT + END + LONG + END + SHORT + END
    assert targets(examples) == whole[1:]
    assert examples.lengths.tolist() == [10, 10, 10, 10]
    assert said(examples)[0] == f"{SHORT}{END}abcde"


def test_texts_of_two_sources_are_not_joined(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", [SHORT]) for name in "ab")
    sources = ({"path": str(one), "weight": 2}, {"path": str(two)})
    examples = load(one, train=sources, wrapped=True)
    assert said(examples) == [SHORT + END] * 2
    assert examples.repeats.tolist() == [2, 1]


def test_no_part_is_longer_than_asked_or_without_a_target() -> None:
    for length in range(1, 40):
        ids = list(range(length))
        parts = split_ids(ids, 8)
        assert [ids[0], *(token for part in parts for token in part[1:])] == ids
        assert all(len(part) <= 8 and (len(part) > 1 or length == 1) for part in parts)


def test_the_parts_of_a_text_are_held_out_together(tmp_path: Path) -> None:
    texts = [f"{letter * 30}" for letter in "abcdefghijklmnop"]
    path = write(tmp_path / "a.jsonl", texts)
    data = DataConfig(train=str(path), eval_fraction=0.2, max_length=10, too_long="split")
    sides = [
        {TOKENIZER.decode(row.input_ids[:1]) for row in load_examples(data, TOKENIZER, split=side)}
        for side in ("train", "eval")
    ]
    assert sides[0] | sides[1] == set("abcdefghijklmnop")
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_tokenizer_s_bos_stands_once_before_a_text_and_the_report_says_it(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT, f"<|endoftext|>{SHORT}", SHORT + END])
    report = load(path, tokenizer=byte_tokenizer(adds_bos=True), max_length=20).report
    assert (report.begins, report.ends) == (("<|endoftext|>",), (END,))
    assert report.train.num_tokens == 3 * 6
    assert load(path, max_length=20).report.train.num_tokens == 5 + 6 + 5


def test_a_conversation_cannot_be_joined_or_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for key in ({"wrapped": True}, {"too_long": "split"}):
        with pytest.raises(DataError, match=r"line 1: data\.\S+ is for plain texts"):
            load(tmp_path / "a.jsonl", **key)


def test_joining_leaves_nothing_to_be_too_long() -> None:
    words = ["model.source=m", "data.train=a", "data.wrapped=true", "data.too_long=drop"]
    with pytest.raises(ConfigError, match=r"data\.too_long drop has no effect"):
        read_config(None, words)


def test_bad_texts_are_listed_and_a_huge_one_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", ["", 7, ["a"], None, "\ud800", "x" * 9_000_000, "x" * 300_000]
    )
    report = load(path, max_bad_fraction=1.0, max_length=4096, wrapped=True).report
    assert report.num_bad_rows == 6
    assert [row.line for row in report.bad_rows] == [1, 2, 3, 4, 5, 6]
    assert report.train.num_supervised_tokens == 300_000


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_gradient_of_joined_texts_is_that_of_transformers_on_the_same_blocks(
    packed: bool, tmp_path: Path
) -> None:
    texts = ["abcdefghijklmnopqrstuv"[: 3 + number % 19] for number in range(12)]
    examples = load(write(tmp_path / "a.jsonl", texts), wrapped=True, max_length=16)
    rows = [
        Row(row.row_id, row.input_ids % 64, row.loss_weights) for row in examples if len(row) == 16
    ]
    assert len(rows) > 5
    model = make_model()
    ids = torch.from_numpy(np.stack([row.input_ids for row in rows])).long()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = Capture(model.parameters())
    expected.step()
    for micro_rows in (1, 3, len(rows)):
        found = Capture(model.parameters())
        model.zero_grad()
        parts = split(Batch(tuple(rows)), packed=packed, micro_rows=micro_rows)
        result = train_step(model, found, parts, settings=settings_for(model, "chunked"))
        assert distance(found.vector(), expected.vector()) < 1e-6
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
