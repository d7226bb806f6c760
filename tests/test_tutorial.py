"""The tutorial ends in a chat with what was trained, and the first minute shows the lines that its page explains."""

import re
import shlex
from pathlib import Path

import pytest

from fitune.cli.app import main
from test_docs import blocks, commands
from tiny_run import save_tiny_model, write_dialogues

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "my-model")
    write_dialogues(tmp_path / "sft.jsonl")
    return tmp_path


def test_the_tutorial_ends_in_an_answer_of_the_exported_model(place: Path) -> None:
    for command in commands(DOCS / "tutorial.md"):
        assert main(shlex.split(command)[1:]) == 0, command
    (code,) = blocks(DOCS / "tutorial.md", "python")
    assert blocks(DOCS / "tutorial.zh.md", "python") == [code]
    said: dict[str, object] = {}
    exec(code, said)
    assert isinstance(said["answer"], str)
    assert said["answer"]


def test_the_first_minute_shows_what_its_page_explains(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (DOCS / "first_minute.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert (
        re.findall(
            r"^\| `([^`]+)` \|", (DOCS / "first_minute.zh.md").read_text("utf-8"), re.MULTILINE
        )
        == explained
    )
    assert main(shlex.split(commands(DOCS / "first_minute.md")[0])[1:]) == 0
    shown = capsys.readouterr().err
    assert len(explained) > 10
    assert [line for line in explained if line not in shown] == []
