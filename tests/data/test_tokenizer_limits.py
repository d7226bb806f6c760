"""A regular expression of a tokenizer that tries without end is one sentence."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from byte_tokenizer import byte_tokenizer
from fitune.cli.app import main
from fitune.data import tokenizer_limits
from fitune.data.formats import Conversation
from fitune.data.tokenise import encode, read_encoder
from fitune.errors import ModelError
from tiny_run import save_tiny_model, write_dialogues

FIBONACCI = "(a|aa)+$"
"""Tries as many ways as that number of the letters says, below the limit of one match of the Oniguruma library."""
NESTED = "(a+)+$"
WORD = 27 * "a" + "!"


def text(words: int) -> Conversation:
    return Conversation(messages=(), weights=(), tools=None, text=words * WORD, digest=0)


def encode_with(pattern: str, chat: Conversation) -> None:
    tokenizer = byte_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel()]
    )
    encode(read_encoder(tokenizer, template=None, mask="all"), [chat])


def test_a_match_that_tries_too_many_ways_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_limits, "MOST_SECONDS", 0.3)
    with pytest.raises(
        ModelError, match=r"more than 0 s of processor time for 840 characters.*model\.tokenizer"
    ):
        encode_with(FIBONACCI, text(30))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_match_that_the_library_gives_up_is_no_panic() -> None:
    with pytest.raises(
        ModelError, match=r"cannot split a text \(PanicException.*retry-limit.*model\.tokenizer"
    ):
        encode_with(
            NESTED, Conversation(messages=(), weights=(), tools=None, text=40 * "a" + "!", digest=0)
        )


def test_who_waits_for_a_tokenizer_hears_ctrl_c() -> None:
    threading.Timer(
        0.2, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    ).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        tokenizer_limits.in_time(lambda: time.sleep(3), num_chars=1)
    assert time.perf_counter() - started < 2


def test_what_a_tokenizer_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        tokenizer_limits.in_time(lambda: 1 // 0, num_chars=1)


def test_check_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny")
    path = tmp_path / "tiny" / "tokenizer.json"
    parts = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": NESTED}, "behavior": "Isolated", "invert": False}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, parts["pre_tokenizer"]]}
    path.write_text(json.dumps(parts))
    row = {"text": 40 * "a" + "!"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    assert (
        main(["check", "--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "rows.jsonl")])
        == 2
    )
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "cannot split a text" in said


def test_a_tokenizer_that_knows_no_unknown_word_is_met_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "tiny")
    path = tmp_path / "tiny" / "tokenizer.json"
    content = json.loads(path.read_text())
    content |= dict.fromkeys(("post_processor", "decoder", "normalizer"))
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    path.write_text(json.dumps(content))
    write_dialogues(tmp_path / "sft.jsonl")
    assert main(["check", str(tmp_path / "sft.jsonl"), "--model", str(tmp_path / "tiny")]) == 2
    said = capsys.readouterr().err
    assert "fails on this text" in said
    assert "Missing [UNK] token" in said
