"""The Plan view answers what `fitune plan` answers, and its commands give the same plan again."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fitune.board.commands import (
    plan_command,
    settings_text,
    settings_yaml,
    train_arguments,
    train_command,
)
from fitune.board.planner import Planner, with_change
from fitune.board.planning import next_moves
from fitune.board.processes import Launcher
from fitune.board.server import application
from fitune.cli.app import main
from fitune.config import read_config
from fitune.model.presets import llama_config

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 96, "vocab_size": 200}  # fmt: skip
SETTINGS = {
    "model.source": "model of mine/config.json",
    "memory.gpu": "RTX 3060",
    "batch.effective": "6",
    "data.max_length": "64",
    "optim.lr": "1e-5",
    "eval.max_rows": "10",
}

Answer = dict[str, Any]


class Page:
    """What the page's scripts ask."""

    def __init__(self, client: TestClient, directory: Path) -> None:
        self.client, self.directory = client, directory

    def plan(self, settings: dict[str, str], *, language: str = "en", **options: object) -> Answer:
        """The events of an answer: the last one of each name."""
        headers = {"x-fitune-token": "token", "x-fitune-language": language}
        body = {"settings": settings, **options}
        text = self.client.post("/api/plan", headers=headers, json=body).text
        events = (block.split("\n") for block in text.strip().split("\n\n"))
        return {
            name.removeprefix("event: "): json.loads(data.removeprefix("data: "))
            for name, data in events
        }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with its planning process, in a directory with a model."""
    directory = tmp_path_factory.mktemp("plans")
    llama_config(**SHAPE).save_pretrained(directory / "model of mine")
    with pytest.MonkeyPatch.context() as patch, Planner() as planner:
        patch.chdir(directory)
        patch.setenv("FITUNE_CACHE", str(directory / "cache"))
        app = application(
            Path("runs"), token="token", planner=planner, launcher=Launcher(directory)
        )
        yield Page(TestClient(app, base_url="http://127.0.0.1:8765"), directory)


@pytest.fixture(scope="module")
def answer(page: Page) -> Answer:
    return page.plan(SETTINGS)


def printed_plan(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Answer:
    assert main([*arguments, "--format", "json"]) == 0
    plan: Answer = json.loads(capsys.readouterr().out)
    return {key: value for key, value in plan.items() if key != "schema"}


def test_the_copied_command_and_the_yaml_give_the_same_plan(
    page: Page, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = answer["commands"]
    program, *arguments = shlex.split(commands["plan"])
    assert program == "fitune"
    assert printed_plan(arguments, capsys) == answer["plan"]["plan"]
    Path("sft.yaml").write_text(commands["yaml"])
    assert printed_plan(["plan", "sft.yaml"], capsys) == answer["plan"]["plan"]


def test_the_copied_run_has_the_configuration_of_the_yaml(
    page: Page, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = []
    Path("sft.yaml").write_text(answer["commands"]["yaml"])
    command = shlex.split(
        train_command(SETTINGS | {"data.train": "none", "model.source": "model of mine"})
    )
    for arguments in (command[1:], ["train", "sft.yaml"]):
        assert main([*arguments, "--print-config", "--format", "json"]) == 0
        configs.append(json.loads(capsys.readouterr().out)["config"])
    configs[1]["memory"]["gpu"] = None  # a run uses the card that is there
    assert configs[0] == configs[1]


def test_a_moved_slider_is_answered_with_the_numbers_of_the_whole_plan(
    page: Page, answer: Answer
) -> None:
    """Of each candidate of the plan, by the setting alone that is held."""
    plan = answer["plan"]["plan"]
    same = [n for n, candidate in enumerate(plan["candidates"]) if candidate["result"] == "same"]
    assert len(same) > 1
    for number in same:
        held = answer["plan"]["rows"][number]["held"]
        [alone] = page.plan(SETTINGS, held=held)["plan"]["plan"]["candidates"]
        assert alone == plan["candidates"][number]
    moved = page.plan(SETTINGS | {"batch.micro": "2", "model.recompute": "full"}, held=held)
    [row] = moved["plan"]["rows"]
    assert row["held"] == {"samples": 2, "recompute": "full", "loss": "chunked", "offloads": False}
    assert "commands" not in moved


def test_what_is_recorded_ahead_are_moves_of_the_sliders_that_are_allowed() -> None:
    settings = settings_text(SETTINGS | {"model.source": "minimind2", "data.max_length": "2048"})
    moves = next_moves(SETTINGS | {"data.max_length": "2048"})
    for move in moves:
        key, _, value = move.partition("=")
        resolved = read_config(None, with_change(settings, move))
        section, name = key.split(".")
        assert getattr(getattr(resolved.config, section), name) == int(value)
    assert {
        "data.max_length=1536",
        "data.max_length=3072",
        "batch.effective=8",
        "batch.micro=1",
    } <= {*moves}
    assert "data.max_length=2048" not in moves


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        ({"memory.gpu": "RTX 4091"}, ["--gpu", "RTX 4091"]),
        ({"model.source": "no/such/model"}, None),
        ({"data.max_length": "many"}, ["--max-length", "many"]),
        ({"batch.micro": "7"}, ["--micro", "7"]),
        ({"optim.lrr": "3"}, ["optim.lrr=3"]),
    ],
)
def test_an_error_is_the_sentence_of_the_command_line(
    page: Page,
    changed: dict[str, str],
    arguments: list[str] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = SETTINGS | changed
    told = page.plan(settings)["error"]
    assert main(shlex.split(plan_command(settings))[1:]) in (1, 2)
    printed = capsys.readouterr().err.splitlines()
    assert told.splitlines() == [line.removeprefix("error: ") for line in printed]
    assert page.plan(settings, language="zh")["error"] != told


def test_what_does_not_fit_says_why(page: Page) -> None:
    held = {"samples": 1, "recompute": "full", "loss": "chunked", "offloads": False}
    found = page.plan(SETTINGS | {"memory.budget": "300MiB"}, held=held)["plan"]
    assert found["plan"]["chosen"] is None
    assert found["reason"].startswith("no plan fits 300.0 MiB on RTX 3060")
    [row] = found["rows"]
    assert row["fits"].startswith("no, +")
    assert row["label"] == "closest"
    assert row["reason"].endswith(" GiB")


def test_commands_stand_for_any_text() -> None:
    strange = {
        "model.source": "-a=b;rm -rf 'x'",
        "run.name": "a b",
        "data.train": "[a.jsonl,b.jsonl]",
    }
    assert shlex.split(plan_command(strange)) == [
        "fitune", "plan", "model.source=-a=b;rm -rf 'x'", "--name", "a b", "data.train=[a.jsonl,b.jsonl]",
    ]  # fmt: skip
    config = read_config(None, settings_text(strange)).config
    assert [source.path for source in config.data.train_sources] == ["a.jsonl", "b.jsonl"]
    assert "rm -rf" in settings_yaml(strange)
    flag = train_arguments({"model.source": "--overwrite", "run.name": "--overwrite"})
    assert flag == ["train", "model.source=--overwrite", "run.name=--overwrite"]
