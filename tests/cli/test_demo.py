"""The demo's own path, shortened: the real model and the real dialogues, two steps of them."""

import json
from pathlib import Path

import pytest

from fitune.cli.app import main
from fitune.run.metrics import read_metrics, read_summary


@pytest.mark.slow
def test_the_demo_trains_the_real_model_and_shows_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    assert main(["demo", "--output", str(tmp_path / "demo"), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    evals = read_metrics(tmp_path / "demo" / "run" / "metrics.jsonl").evals
    assert evals[-1].eval_loss < evals[0].eval_loss
    assert f"{evals[0].eval_loss:.4f} before, {evals[-1].eval_loss:.4f} after" in shown
    assert shown.count("answer ") == 2
    assert (tmp_path / "demo" / "run" / "best" / "model.safetensors").is_file()
    summary = read_summary(tmp_path / "demo" / "run" / "summary.json")
    assert summary.status == "finished"
    assert summary.peak_device_bytes is not None
    assert summary.peak_device_bytes > 2**30


def test_the_dialogues_are_whole_exchanges(tmp_path: Path) -> None:
    from fitune.cli.demo import corpus_directory, write_dialogues

    path = tmp_path / "english.jsonl"
    assert write_dialogues(corpus_directory("english"), path) > 1000
    for line in path.read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_a_place_that_holds_no_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", "/proc/demo"]) == 2
    said = "error: /proc is no place for files: its file system has 0 bytes; change --output"
    assert capsys.readouterr().err.splitlines() == [said]


def test_an_unknown_language_is_refused_with_those_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output", str(tmp_path), "--language", "klingon"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: chatterbot-corpus has no language 'klingon'")
    assert "english" in error
    assert not list(tmp_path.iterdir())
