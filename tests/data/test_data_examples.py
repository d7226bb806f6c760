"""Examples: what is kept, cut, dropped, held out, cached and reported."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fitune.data.examples
from byte_tokenizer import STRICT, byte_tokenizer
from fitune.config import DataConfig, DataSource
from fitune.data.examples import Examples, load_examples
from fitune.errors import DataError

TOKENIZER = byte_tokenizer()
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def chat(asked: str, said: str, **keys: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": said, **keys},
        ]
    }


def write(path: Path, rows: Iterable[object]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def load(path: Path, split: Any = "train", tokenizer: Any = TOKENIZER, **keys: Any) -> Examples:
    return load_examples(
        DataConfig(train=str(path), **{"eval_fraction": 0, **keys}), tokenizer, split=split
    )


def texts(examples: Examples) -> list[str]:
    return [TOKENIZER.decode(row.input_ids) for row in examples]


def numbered(num: int) -> list[dict[str, Any]]:
    return [chat(f"question {i}", f"answer {i}") for i in range(num)]


def test_a_row_has_its_tokens_and_a_weight_for_each(tmp_path: Path) -> None:
    row = load(write(tmp_path / "a.jsonl", [chat("Q", "A", loss_weight=0.5)]))[0]
    prompt = len("<s>user\nQ<e>\n<s>assistant\n".replace("<s>", "s").replace("<e>", "e"))
    assert (
        TOKENIZER.decode(row.input_ids)
        == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert row.loss_weights.tolist() == [0.0] * prompt + [0.5] * 3
    assert (row.input_ids.dtype, row.loss_weights.dtype, row.row_id) == (np.int32, np.float32, 0)


def test_the_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", numbered(20)))
    assert len(examples) == len(list(examples)) == 20
    assert examples.lengths.tolist() == [len(row) for row in examples]
    assert examples.num_tokens == sum(map(len, examples))
    assert examples.num_supervised_tokens == sum(
        int((row.loss_weights > 0).sum()) for row in examples
    )
    assert examples.report.train.num_rows == 20


def test_an_index_past_the_end_is_refused(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", numbered(3)))
    assert examples[-1].row_id == 2
    with pytest.raises(IndexError):
        examples[3]


def test_rows_of_several_chunks_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", numbered(20))
    whole = texts(load(path))
    monkeypatch.setattr(fitune.data.examples, "_CHUNK_ROWS", 7)
    assert texts(load(path, max_length=2000)) == whole


def test_a_long_row_is_cut_and_one_without_targets_left_is_dropped_and_listed(
    tmp_path: Path,
) -> None:
    rows = [chat("Q", "A"), chat("Q", "long " * 20), chat("long " * 20, "A")]
    examples = load(write(tmp_path / "a.jsonl", rows), max_length=40)
    assert examples.lengths.tolist() == [len(load(tmp_path / "a.jsonl")[0]), 40]
    assert examples.num_supervised_tokens == sum(
        int((row.loss_weights > 0).sum()) for row in examples
    )
    assert (examples.report.train.num_long_rows, examples.report.train.num_untrainable_rows) == (
        2,
        1,
    )
    assert [(row.line, row.reason) for row in examples.report.dropped_rows] == [
        (3, "no supervised token left after the cut (122 tokens, data.max_length 40)")
    ]


def test_a_long_row_can_be_dropped_whole(tmp_path: Path) -> None:
    rows = [chat("Q", "A"), chat("Q", "long " * 20)]
    examples = load(write(tmp_path / "a.jsonl", rows), max_length=40, too_long="drop")
    assert len(examples) == 1
    assert examples.report.dropped_rows[0].reason.startswith("too long (")


def test_bad_rows_are_counted_and_listed_with_their_lines(tmp_path: Path) -> None:
    bad = ["{", chat("Q", ""), {"messages": [{"role": "user", "content": "Q"}]}, [1]]
    report = load(write(tmp_path / "a.jsonl", [*numbered(4), *bad]), max_bad_fraction=0.5).report
    assert (report.num_rows, report.num_bad_rows, report.train.num_rows) == (8, 4, 4)
    assert [row.line for row in report.bad_rows] == [5, 6, 7, 8]
    assert report.bad_rows[2].reason == "it has no assistant message, so nothing to learn from"


def test_too_many_bad_rows_stop_the_run_and_the_first_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*numbered(9), "{"])
    with pytest.raises(
        DataError, match=r"1 of 10 samples cannot be used(.|\n)*a.jsonl, line 10: broken JSON"
    ):
        load(path, max_bad_fraction=0.09)
    assert load(path, max_bad_fraction=0.1).report.num_bad_rows == 1


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1,000 of 1,000 samples cannot be used"):
        load(write(tmp_path / "a.jsonl", ["{"] * 5000))


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "assistant", "content": "A"}]}
    examples = load(
        write(tmp_path / "a.jsonl", [*numbered(3), bad]),
        tokenizer=byte_tokenizer(STRICT),
        max_bad_fraction=0.5,
    )
    assert examples.report.bad_rows[0].reason.endswith("Roles must alternate user/assistant")


def test_two_formats_in_one_file_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [chat("Q", "A"), chat("Q", "A"), {"instruction": "Q", "output": "A"}]
    )
    with pytest.raises(DataError, match="line 1 is 'messages', line 3 is 'alpaca'"):
        load(path)


def test_files_of_a_directory_may_have_different_formats(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", [chat("Q", "A")])
    write(tmp_path / "d" / "b.jsonl", [{"instruction": "Q", "output": "A"}])
    assert load(tmp_path / "d").report.sources[0].formats == ("messages", "alpaca")


def test_data_that_trains_on_nothing_is_refused(tmp_path: Path) -> None:
    rows = [chat("Q", "A", loss_weight=0)] * 3
    with pytest.raises(
        DataError, match="learn from nothing, since none of its 3 samples has a supervised token"
    ):
        load(write(tmp_path / "a.jsonl", rows))


def test_plain_text_needs_no_template(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", [{"text": "once"}]), tokenizer=byte_tokenizer(None))
    assert texts(examples) == ["once<|im_end|>"]
    assert examples[0].loss_weights.tolist() == [0, 1, 1, 1, 1]


def test_the_held_out_rows_are_the_same_in_every_order(tmp_path: Path) -> None:
    rows = numbered(400)
    first = write(tmp_path / "a.jsonl", rows)
    random.Random(1).shuffle(rows)
    second = write(tmp_path / "b.jsonl", rows)
    sides = [
        [set(texts(load(path, split, eval_fraction=0.1))) for split in ("train", "eval")]
        for path in (first, second)
    ]
    assert sides[0] == sides[1]
    assert len(sides[0][0]) + len(sides[0][1]) == 400
    assert 20 <= len(sides[0][1]) <= 60


def test_copies_of_a_row_lie_on_one_side_even_where_the_number_held_out_is_capped(
    tmp_path: Path,
) -> None:
    data = DataConfig(train=str(write(tmp_path / "a.jsonl", numbered(40) * 5)), eval_fraction=0.5)
    train, held_out = (
        load_examples(data, TOKENIZER, split=split, eval_max_rows=12) for split in ("train", "eval")
    )
    assert len(held_out) == 10
    assert not set(texts(train)) & set(texts(held_out))
    assert train.report.train.num_duplicate_rows == 190 - 38


def test_a_small_data_set_holds_out_one_row_and_a_single_row_none(tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "a.jsonl", numbered(5)), "eval", eval_fraction=0.01)) == 1
    alone = load(write(tmp_path / "b.jsonl", numbered(1)), "eval", eval_fraction=0.01)
    assert (len(alone), alone.report.train.num_rows) == (0, 1)
    assert alone.report.warnings == (
        "no sample is held out: the samples are too few or all alike, so there is no evaluation",
    )


def test_data_eval_is_the_evaluation_and_rows_in_both_are_told(tmp_path: Path) -> None:
    train, held_out = (
        write(tmp_path / "a.jsonl", numbered(5)),
        write(tmp_path / "b.jsonl", numbered(6)[4:]),
    )
    examples = load(train, "eval", eval=str(held_out), eval_fraction=0.5)
    assert (len(examples), examples.report.train.num_rows) == (2, 5)
    assert "1 samples of data.train are in data.eval too" in examples.report.warnings[0]


def test_sources_are_mixed_by_weight_and_each_has_its_limit(tmp_path: Path) -> None:
    sources = (
        DataSource(path=str(write(tmp_path / "a.jsonl", numbered(5))), weight=2),
        DataSource(
            path=str(
                write(
                    tmp_path / "b.jsonl", [{"instruction": str(i), "output": "A"} for i in range(9)]
                )
            ),
            max_rows=3,
        ),
    )
    examples = load_examples(DataConfig(train=sources, eval_fraction=0), TOKENIZER)
    assert examples.repeats.tolist() == [2.0] * 5 + [1.0] * 3
    assert [(source.num_rows, source.formats) for source in examples.report.sources] == [
        (5, ("messages",)),
        (3, ("alpaca",)),
    ]


def test_what_has_no_effect_is_told(tmp_path: Path) -> None:
    row = chat("Q", "A", reasoning_content="R") | {"tools": [{"name": "f"}]}
    row["messages"][0]["loss_weight"] = 1
    warnings = load(write(tmp_path / "a.jsonl", [row])).report.warnings
    assert [warning.split(",")[0] for warning in warnings] == [
        "1 samples hold reasoning_content",
        "1 samples hold tools",
        "1 samples weigh messages that are not the assistant's",
    ]


def test_a_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    first = load(path)
    monkeypatch.setattr(fitune.data.examples, "read_rows", None)
    second = load(path)
    assert texts(second) == texts(first)
    assert (second.report, second.data_hash) == (first.report, first.data_hash)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"mask": "all"},
        {"too_long": "drop"},
        {"max_rows": 4},
        {"max_bad_fraction": 0.5},
    ],
    ids=str,
)
def test_what_changes_the_rows_makes_a_new_table(
    tmp_path: Path, cache: Path, change: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    load(path)
    load(path, **change)
    assert len(list(cache.glob("*/rows.arrow"))) == 2


def test_another_tokenizer_or_a_changed_file_makes_a_new_table(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    load(path)
    load(path, tokenizer=byte_tokenizer(adds_bos=True))
    assert len(load(write(path, numbered(6)))) == 6
    assert len(list(cache.glob("*/rows.arrow"))) == 3


def test_what_is_held_out_does_not_make_a_new_table(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    hashes = {
        load(path, split, eval_fraction=fraction).data_hash
        for split in ("train", "eval")
        for fraction in (0.3, 0.6)
    }
    assert len(list(cache.glob("*/rows.arrow"))) == 1
    assert len(hashes) > 2


def test_padding_a_tokenizer_does_not_make_a_new_table(tmp_path: Path, cache: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", numbered(5)), byte_tokenizer()
    load(path, tokenizer=tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    load(path, tokenizer=tokenizer)
    assert len(list(cache.glob("*/rows.arrow"))) == 1


def test_an_interrupted_writing_leaves_nothing_that_is_read(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))

    def interrupt(num_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_examples(
            DataConfig(train=str(path), eval_fraction=0), TOKENIZER, on_progress=interrupt
        )
    assert not list(cache.glob("*/facts.json"))
    assert len(load(path)) == 5
    assert not list(cache.glob("*.unfinished"))


def test_a_damaged_table_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    whole = texts(load(path))
    table = next(cache.glob("*/rows.arrow"))
    table.write_bytes(table.read_bytes()[:100])
    assert texts(load(path)) == whole


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (blocked := tmp_path / "file").write_text("")
    monkeypatch.setenv("FITUNE_CACHE", str(blocked))
    with pytest.raises(DataError, match="FITUNE_CACHE names another place"):
        load(write(tmp_path / "a.jsonl", numbered(2)))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))

    def change(num_rows: int) -> None:
        write(path, numbered(6))

    with pytest.raises(DataError, match="changed while it was read"):
        load_examples(DataConfig(train=str(path)), TOKENIZER, on_progress=change)


MEMORY_PROGRAM = """
import resource, sys
from byte_tokenizer import byte_tokenizer
from fitune.config import DataConfig
from fitune.data.examples import load_examples
tokenizer = byte_tokenizer()
peaks = []
for path in sys.argv[1:]:
    load_examples(DataConfig(train=path), tokenizer)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_ten_times_the_rows_take_no_ten_times_the_memory(tmp_path: Path, cache: Path) -> None:
    """A row of 140 tokens held as Python objects would be more than 1 kB; as numbers about the table it is 22 bytes,
    and a few times that while the split is made."""
    pytest.importorskip("resource")
    few = write(tmp_path / "few.jsonl", ({"text": f"{i} " * 20} for i in range(10_000, 13_000)))
    many = write(tmp_path / "many.jsonl", ({"text": f"{i} " * 20} for i in range(100_000, 130_000)))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}:{Path(__file__).parents[1]}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(few), str(many)]
    kib = [
        int(peak) for peak in subprocess.check_output(command, env=environment, text=True).split()
    ]
    assert (kib[1] - kib[0]) * 1024 < 30_000 * 500 + 8 * 2**20
