"""A plan for several cards is that of one card's share of the rows, and says what it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.config import read_config
from fitune.plan.plan import Plan
from fitune.plan.planner import choose_plan
from fitune.plan.share import BUCKET_BYTES, share_of
from fitune.units import GIB
from tiny_models import TINY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a model's configuration in model/."""
    directory = tmp_path_factory.mktemp("share")
    TINY["llama"].save_pretrained(directory / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        yield directory


def plan(place: Path, rows: int, *, num_gpus: int = 1, **memory: str) -> Plan:
    tree = {
        "model": {"source": str(place / "model")},
        "data": {"train": "missing.jsonl", "max_length": 64},
        "batch": {"effective": rows},
        "memory": memory,
    }
    return choose_plan(read_config(tree).config, gpu="RTX 4090", num_gpus=num_gpus)


def test_each_card_has_its_share_of_the_rows_and_a_buffer(place: Path) -> None:
    shared, one = plan(place, 7, num_gpus=2), plan(place, 4)
    assert len(shared.candidates) == len(one.candidates)
    for mine, theirs in zip(shared.candidates, one.candidates, strict=True):
        assert mine.categories["workspace"] == theirs.categories.get("workspace", 0) + BUCKET_BYTES
        assert mine.predicted_device_bytes == theirs.predicted_device_bytes + BUCKET_BYTES
        assert sum(mine.categories.values()) == mine.predicted_allocated_bytes
        assert mine.predicted_seconds_per_step == theirs.predicted_seconds_per_step
    assert (shared.data["effective_batch"], shared.data["gpus"]) == (7, 2)
    assert shared.data["tokens_per_step"] == 7 * 64


def test_the_buffer_is_part_of_what_has_to_fit(place: Path) -> None:
    one = plan(place, 4)
    assert one.chosen is not None
    needed = one.candidates[one.chosen].predicted_device_bytes
    budget = f"{needed + BUCKET_BYTES // 2}B"
    assert plan(place, 4, budget=budget).chosen == one.chosen
    assert plan(place, 8, num_gpus=2, budget=budget).chosen != one.chosen
    assert needed < GIB


def test_what_is_not_in_the_time_is_said(place: Path) -> None:
    sentence = plan(place, 8, num_gpus=2).assumptions[1]
    assert "the sum of the gradients over 2 cards is not in the time" in sentence
    assert plan(place, 8).assumptions[1:2] != (sentence,)


@pytest.mark.parametrize(
    ("batch", "rows", "micro"),
    [({"effective": 9}, 5, None), ({"effective": 6, "micro": 6}, 3, 3), ({"micro": 2, "accumulation": 4}, 4, 2)],
)
def test_a_share_keeps_the_micro_batch_where_it_can(batch: dict[str, int], rows: int, micro: int | None) -> None:
    config = read_config({"model": {"source": "m"}, "data": {"train": "d"}, "batch": batch}).config
    share = share_of(config, 2).batch
    assert (share.rows_per_step, share.micro_rows) == (rows, micro)


def test_the_plan_of_several_cards_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(place / "model"), "data.max_length=64", "batch.effective=8", "--gpu", "RTX 4090"]
    assert main([*words, "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2, which share the rows of a step; memory is of each" in shown
    assert "each card sends" in shown
    assert main([*words, "--gpus", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["gpus"] == 2


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--gpus", "2", "--splits", "1x2"], ["--gpus", "2", "--measure"]])
def test_what_is_of_one_card_is_refused(words: list[str], place: Path) -> None:
    assert main(["plan", str(place / "model"), "--gpu", "RTX 4090", *words]) == 2
