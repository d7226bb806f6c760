"""`fitune chat`: at a terminal, from a pipe, and what it says where something is missing."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpe_tokenizer import save_bpe_tokenizer
from disturbed_run import predict_nothing
from fitune.cli.app import main
from fitune.model.load import build_model, quiet_transformers
from fitune.model.presets import llama_config
from tiny_run import write_config, write_dialogues

SOURCE = Path(__file__).parents[2] / "src"
TINY = llama_config(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=4096,
    initializer_range=0.2, eos_token_id=None, bos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny/, which never ends an answer by itself, and runs/run of adapters on it."""
    directory = tmp_path_factory.mktemp("chat")
    with quiet_transformers():
        build_model(TINY, seed=3).save_pretrained(directory / "tiny")
    save_bpe_tokenizer(directory / "tiny")
    with pytest.MonkeyPatch.context() as patched:
        predict_nothing(patched)
        patched.chdir(directory)
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        write_dialogues(directory / "sft.jsonl")
        write_config(
            directory / "sft.yaml",
            {"data": {"max_length": 128}, "model": {"method": "lora"}, "train": {"steps": 2}},
        )
        assert main(["train", "sft.yaml"]) == 0
    return directory


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *arguments: str
) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    assert main(["chat", *arguments]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["chat", *arguments]) == 2
    return capsys.readouterr().err


def test_each_line_of_a_pipe_is_answered_alone_and_equal_seeds_answer_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("run", "--max-new-tokens", "8")
    both = ask(monkeypatch, capsys, "w1 w2\n\nw3\n", *flags)
    assert both.endswith(ask(monkeypatch, capsys, "w3\n", *flags))
    assert both != ask(monkeypatch, capsys, "w1 w2\n\nw3\n", *flags, "--seed", "1")
    assert ">" not in both.splitlines()[0][:2]


def test_the_base_model_is_asked_without_the_adapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max-new-tokens", "8", "--temperature", "0")
    alone = ask(monkeypatch, capsys, "w1\n", "tiny", *flags)
    tuned = ask(monkeypatch, capsys, "w1\n", "run", *flags)
    assert alone != tuned
    both = ask(monkeypatch, capsys, "w1\n", "run", "--base", *flags)
    assert both == f"base: {alone}tuned: {tuned}"


def test_exported_adapters_and_a_gguf_file_answer_as_the_run_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--max-new-tokens", "8", "--temperature", "0")
    tuned = ask(monkeypatch, capsys, "w1\n", "run", *flags)
    adapters, whole = tmp_path / "adapters", tmp_path / "whole"
    assert main(["export", "run", "--to", "hf", "--adapter", "-o", str(adapters)]) == 0
    assert main(["export", "run", "--to", "gguf", "--quantise", "f32", "-o", str(whole)]) == 0
    assert {path.name for path in whole.iterdir()} == {"run-f32.gguf", "Modelfile", "README.md"}
    for place in (adapters, whole, whole / "run-f32.gguf"):
        assert ask(monkeypatch, capsys, "w1\n", str(place), *flags) == tuned


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "there is no run nothing" in error_of(capsys, "nothing")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {source: tiny}\ndata: {train: sft.jsonl}\n")
    assert "has no last/ yet: let the run save once" in error_of(capsys, str(tmp_path))
    assert "tiny does not say which model it was made of" in error_of(capsys, "tiny", "--base")
    with quiet_transformers():
        build_model(TINY).save_pretrained(tmp_path / "mute")
    save_bpe_tokenizer(tmp_path / "mute", template=None)
    message = error_of(capsys, str(tmp_path / "mute"))
    assert "mute has no chat template" in message
    assert "--template FILE.jinja" in message


class Terminal:
    """A pseudo-terminal with `fitune chat` in it."""

    def __init__(self, *arguments: str) -> None:
        self._fd, other = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fitune", "chat", *arguments],
            stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
            preexec_fn=_control_terminal,
        )  # fmt: skip
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        """Everything up to the pattern."""
        text, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, text):
            assert time.monotonic() < deadline, text
            if select.select([self._fd], [], [], 0.1)[0]:
                text += os.read(self._fd, 4096).decode(errors="replace")
        return text


def _control_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C on it is a signal


def test_a_terminal_is_asked_stopped_reset_and_left() -> None:
    terminal = Terminal("run", "--max-new-tokens", "4000")
    try:
        assert "Ctrl-C stops an answer" in terminal.wait_for("\n> ")
        terminal.type("w1 w2\n")
        terminal.wait_for("w1 w2\r\n.{20}")  # the answer has begun, and would go on for minutes
        terminal.type("\x03")
        terminal.wait_for("\n> ")
        terminal.type("/what\n")
        terminal.wait_for("/what is no command: /reset or /exit")
        terminal.type("/reset\n")
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
