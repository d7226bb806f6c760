"""What `fitune check` says about data."""

import json
from pathlib import Path
from typing import Any

import pytest

from byte_tokenizer import byte_tokenizer
from fitune.cli.check import report_on
from fitune.config import DataConfig

TOKENIZER = byte_tokenizer()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows: list[Any] = [
        {"instruction": f"question {i}", "output": "answer " * (i % 9 + 1)} for i in range(40)
    ]
    lines = [
        json.dumps(row) for row in (*rows, rows[0], {"instruction": "long " * 30, "output": "A"})
    ]
    Path("sft.jsonl").write_text("\n".join([*lines, "{broken"]))
    return DataConfig(train="sft.jsonl", max_length=96, eval_fraction=0.2, max_bad_fraction=0.1)


def test_the_first_ten_lines_say_what_is_learned_cut_and_ignored(
    data: DataConfig, tmp_path: Path
) -> None:
    rows = [{"instruction": f"question {i}", "output": "answer", "mood": "good"} for i in range(3)]
    Path("sft.jsonl").write_text(
        "\n".join(json.dumps(row) for row in [*rows, {"instruction": "x" * 99, "output": "A"}])
    )
    lines = report_on(data, tokenizer=TOKENIZER, width=100).splitlines()[:10]
    for part in (
        "loss     assistant turns only",
        "learned  ⟦answer<|im_end|>\\n⟧ in the first sample",
        "ends     answers end with <|im_end|>, where the saved model stops",
        "cut      1 sample has over 96 tokens; 1 sample teaches nothing and goes",
        "! 3 samples hold the key 'mood', which is ignored",
    ):
        assert any(line.startswith(part) for line in lines), (part, lines)


@pytest.mark.parametrize("width", [80, 100])
def test_the_report_fits_its_width_and_cuts_no_number(data: DataConfig, width: int) -> None:
    shown = report_on(data, tokenizer=TOKENIZER, width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    head = next(line for line in shown.splitlines() if line.startswith("split"))
    assert head.split() == [
        "split",
        "samples",
        "tokens",
        "p50",
        "p95",
        "p99",
        "max",
        ">",
        "96",
        "no",
        "target",
    ]


def test_the_report_names_format_mask_losses_and_bad_rows(data: DataConfig) -> None:
    shown = " ".join(report_on(data, tokenizer=TOKENIZER).split())
    for part in (
        "sft.jsonl: alpaca, 43 samples",
        "through the tokenizer's chat template",
        "assistant turns only",
        "(found by marked messages)",
        "! 1 training sample is a copy of others",
        "! padding every sample to 96 computes",
        "bad samples, not used: 1; the first ones sft.jsonl, line 43: broken JSON at column 2",
        "samples dropped: 1; the first ones sft.jsonl, line 42: no supervised token left after the cut",
    ):
        assert part in shown


def test_json_holds_the_same_numbers_as_integers(data: DataConfig) -> None:
    report = json.loads(report_on(data, tokenizer=TOKENIZER, output_format="json"))
    assert (report["schema"], report["num_rows"], report["num_bad_rows"]) == (1, 43, 1)
    assert report["train"]["num_rows"] + report["eval"]["num_rows"] == 41
    assert report["train"]["quantiles"].keys() == {
        "p50_tokens",
        "p95_tokens",
        "p99_tokens",
        "max_tokens",
    }
    assert report["bad_rows"][0] == {
        "path": "sft.jsonl",
        "line": 43,
        "reason": "broken JSON at column 2: Expecting property name enclosed in double quotes",
    }


def test_rows_are_shown_with_what_is_supervised(data: DataConfig) -> None:
    shown = report_on(data, tokenizer=TOKENIZER, show=1)
    assert "<|im_start|>user\nquestion" in shown
    assert "<|im_start|>assistant\n⟦answer" in shown
    assert "\x1b[32m" in report_on(data, tokenizer=TOKENIZER, show=1, colour=True)
