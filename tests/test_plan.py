"""What a plan promises: parts that add up, more rows never for less, the contract of its JSON, exit 3."""

import json
from pathlib import Path
from typing import Any

import pytest

import fitune
from fitune.cli.app import main
from fitune.config import RunConfig, read_config
from fitune.errors import UsageError
from fitune.memory.devices import find_device
from fitune.plan.planner import choose_plan
from fitune.plan.predict import predict, predict_run
from tiny_models import TINY

CANDIDATE_KEYS = {
    "micro_batch", "micro_tokens", "accumulation", "recompute", "loss", "optimizer", "precision", "method",
    "attention", "packing", "predicted_allocated_bytes", "predicted_reserved_bytes", "predicted_device_bytes",
    "categories", "peak_phase", "predicted_seconds_per_step", "fits", "reason",
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    TINY["llama"].save_pretrained(tmp_path / "model")
    return {
        "model": {"source": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "missing.jsonl"), "max_length": 32},
        "batch": {"effective": 4},
    }


def config(tree: dict[str, Any], *overrides: str) -> RunConfig:
    return read_config(tree, overrides).config


def command(tree: dict[str, Any], *words: str) -> list[str]:
    arguments = [f"{section}.{key}={value}" for section, keys in tree.items() for key, value in keys.items()]
    return ["plan", *arguments, *words]


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_the_categories_add_up_to_the_peak(tree: dict[str, Any], gpu: str) -> None:
    prediction = predict(tree, gpu=gpu)
    assert sum(prediction.categories.values()) == prediction.peak_allocated_bytes
    assert prediction.peak_allocated_bytes <= prediction.peak_reserved_bytes <= (prediction.device_bytes or 0)


def test_more_rows_never_need_less(tree: dict[str, Any]) -> None:
    device = find_device("RTX 4090")
    peaks = [
        predict_run(config(tree, f"batch.micro={rows}"), device).training.peak_allocated_bytes for rows in (1, 2, 4)
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_recomputing_needs_less(tree: dict[str, Any]) -> None:
    kept = predict(tree, gpu="RTX 4090", overrides=["model.recompute=off"])
    recomputed = predict(tree, gpu="RTX 4090", overrides=["model.recompute=full"])
    assert recomputed.categories["activation"] < kept.categories["activation"]


def test_predict_is_the_packages_own(tree: dict[str, Any]) -> None:
    assert fitune.predict is predict


def test_an_unknown_card_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown card 'RTX 4091'"):
        predict(tree, gpu="RTX 4091")


def test_a_forced_candidate_is_printed_by_the_contract(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--gpu", "RTX 4090", "--budget", "24GiB", "--format", "json", "batch.micro=4", "batch.accumulation=1")
    assert main(command(tree, *words)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert set(found["model"]) == {"name", "num_parameters", "num_trainable_parameters"}
    assert set(found["device"]) == {"name", "total_bytes", "free_bytes", "context_bytes"}
    assert found["budget_bytes"] == 24 * 2**30
    assert found["data"]["max_length"] == 32
    assert found["chosen"] == 0
    assert (found["candidates"][0]["micro_batch"], found["candidates"][0]["accumulation"]) == (4, 1)
    for candidate in found["candidates"]:
        assert set(candidate) == CANDIDATE_KEYS
        assert sum(candidate["categories"].values()) == candidate["predicted_allocated_bytes"]


def test_the_largest_micro_batch_that_fits_is_chosen(tree: dict[str, Any]) -> None:
    plan = choose_plan(config(tree), gpu="RTX 4090")
    assert plan.chosen is not None
    assert (plan.candidates[plan.chosen].micro_batch, plan.candidates[plan.chosen].recompute) == (4, "off")


def test_a_budget_between_two_candidates_chooses_the_smaller(tree: dict[str, Any]) -> None:
    tree["data"]["max_length"] = 2048
    tree["model"]["recompute"] = "off"
    device = find_device("RTX 4090")
    two, four = (predict_run(config(tree, f"batch.micro_tokens={n * 2048}"), device) for n in (2, 4))
    middle = (two.largest.peak_reserved_bytes + four.largest.peak_reserved_bytes) // 2 + two.context_bytes
    plan = choose_plan(config(tree, f"memory.budget={middle}B"), gpu="RTX 4090")
    assert plan.chosen is not None
    assert plan.candidates[plan.chosen].micro_batch == 2


def test_what_fits_nowhere_exits_with_3_and_says_what_is_large(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--gpu", "RTX 4090", "--budget", "301MiB", "--format", "json")) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["chosen"] is None
    assert "no plan fits 301.0 MiB on RTX 4090: the closest candidate" in err
    assert "Try" in err


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_stays_within_the_screen(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(command(tree, "--gpu", "RTX 4090", "--format", "human", "model.recompute=off")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "x" in line or "─" in line]
    assert lines
    table = [line for line in lines if "target" not in line and "budget" not in line and "model" not in line]
    assert max(map(visible_length, table)) <= columns


def visible_length(line: str) -> int:
    import re

    return len(re.sub(r"\x1b\[[0-9;]*m", "", line))
