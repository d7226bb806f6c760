"""The demo's own path, shortened: the real dialogues, two steps of them, with a small model and with the real one."""

import json
from pathlib import Path

import pytest

from byte_tokenizer import byte_tokenizer
from disturbed_run import predict_nothing
from fitune.cli.app import main
from fitune.model.load import build_model
from fitune.model.presets import llama_config
from fitune.run.metrics import Summary, read_metrics, read_summary


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's model is a small one with random weights, and its run does not plan."""
    directory = tmp_path / "model"
    config = llama_config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, intermediate_size=48,
    )  # fmt: skip
    build_model(config, seed=3).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    monkeypatch.setattr("fitune.cli.demo.smollm2_file", lambda: directory)
    predict_nothing(monkeypatch)


@pytest.mark.usefixtures("tiny")
def test_the_demo_trains_a_model_and_shows_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown_summary(tmp_path, capsys, monkeypatch).status == "finished"


@pytest.mark.thorough
def test_the_demo_trains_the_real_model_and_shows_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = shown_summary(tmp_path, capsys, monkeypatch)
    assert summary.status == "finished"
    assert summary.peak_device_bytes is not None
    assert summary.peak_device_bytes > 2**30


def shown_summary(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Summary:
    """Of a demo of two steps, whose losses and answers are shown."""
    monkeypatch.setenv("FITUNE_CACHE", str(place / "cache"))
    assert main(["demo", "--output", str(place / "demo"), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    evals = read_metrics(place / "demo" / "run" / "metrics.jsonl").evals
    assert evals[-1].eval_loss < evals[0].eval_loss
    assert f"{evals[0].eval_loss:.4f} before, {evals[-1].eval_loss:.4f} after" in shown
    assert shown.count("answer ") == 2
    assert (place / "demo" / "run" / "best" / "model.safetensors").is_file()
    return read_summary(place / "demo" / "run" / "summary.json")


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
