"""A plan for several cards is that of one card's share of the rows, and says what it does not know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fitune.cli.app import main
from fitune.config import read_config
from fitune.planning.plan import Plan
from fitune.planning.search import choose_plan
from fitune.planning.several_cards import BUCKET_BYTES, share_of
from fitune.recorder.events import MemoryEvent, MemoryTrace
from fitune.trace.sharded import sharded
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
    assert shared.training == plan(place, 7).training
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
    [
        ({"effective": 9}, 5, None),
        ({"effective": 6, "micro": 6}, 3, 3),
        ({"micro": 2, "accumulation": 4}, 4, 2),
    ],
)
def test_a_share_keeps_the_micro_batch_where_it_can(
    batch: dict[str, int], rows: int, micro: int | None
) -> None:
    config = read_config({"model": {"source": "m"}, "data": {"train": "d"}, "batch": batch}).config
    share = share_of(config, 2).batch
    assert (share.rows_per_step, share.micro_rows) == (rows, micro)


def test_the_plan_of_several_cards_is_shown(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        str(place / "model"),
        "data.max_length=64",
        "batch.effective=8",
        "--gpu",
        "RTX 4090",
    ]
    assert main([*words, "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2, which share the samples of a step; memory is of each" in shown
    assert "each card sends" in shown
    assert main([*words, "--gpus", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["gpus"] == 2


@pytest.mark.parametrize(
    "words", [["--gpus", "0"], ["--gpus", "2", "--splits", "1x2"], ["--gpus", "2", "--measure"]]
)
def test_what_is_of_one_card_is_refused(words: list[str], place: Path) -> None:
    assert main(["plan", str(place / "model"), "--gpu", "RTX 4090", *words]) == 2


def sharded_plan(place: Path, num_gpus: int, **model: str) -> Plan:
    tree = {
        "model": {"source": str(place / "model"), **model},
        "data": {"train": "missing.jsonl", "max_length": 64},
        "batch": {"effective": 4 * num_gpus, "micro": 2},
    }
    return choose_plan(read_config(tree).config, gpu="RTX 4090", num_gpus=num_gpus)


def test_a_sharded_plan_has_a_share_of_the_weights_and_what_is_gathered(place: Path) -> None:
    whole, two, four = (
        sharded_plan(place, num_gpus, shard=shard).candidates[0].categories
        for num_gpus, shard in ((2, "none"), (2, "full"), (4, "full"))
    )
    for name in (
        "parameter",
        "optimizer_state",
    ):  # blocks of 512 bytes count for more, the smaller the shards
        assert 1 <= two[name] / (whole[name] / 2) < 1.6
        assert 1 <= four[name] / (whole[name] / 4) < 1.6
    assert BUCKET_BYTES > two["workspace"] > four["workspace"] > 0


def test_a_sharded_plan_says_what_it_assumes(place: Path) -> None:
    plan = sharded_plan(place, 2, shard="full")
    assert (
        "over 2 cards, before each layer's forward and again before its backward"
        in plan.assumptions[1]
    )
    assert any("it has not been measured on cards" in sentence for sentence in plan.assumptions)


def test_a_sharded_plan_needs_the_number_of_cards(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        str(place / "model"),
        "data.max_length=64",
        "model.shard=full",
        "--gpu",
        "RTX 4090",
    ]
    assert main(words) == 2
    assert "say over how many with --gpus" in capsys.readouterr().err


def test_the_events_of_a_shard_are_those_of_its_columns() -> None:
    events = [
        MemoryEvent(3, 1001, "parameter", "load", module="a"),
        MemoryEvent(7, 500, "activation", "forward", 1, module="b"),
        MemoryEvent(7, -500, "activation", "backward", 1),
        MemoryEvent(3, -1001, "parameter", "optimizer", 1),
    ]
    trace = sharded(MemoryTrace(events), num_shards=2, gathered_bytes=64)
    columns = trace.columns()
    assert (
        columns.num_bytes.tolist()
        == [event.num_bytes for event in trace.events]
        == [64, 501, 500, -500, -501]
    )
    assert columns.storage.tolist() == [event.storage for event in trace.events] == [8, 3, 7, 7, 3]
    names, which = trace.modules(np.array([0, 1, 2]))
    assert [names[i] for i in which] == ["gathered layers", "a", "b"]
