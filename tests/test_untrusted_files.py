"""Files of a model that lead outside of its directory, or beyond any memory, are refused in a sentence."""

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from fitune.cli.app import main
from fitune.config import ModelConfig
from fitune.errors import ModelError
from fitune.model.load import load_config, load_tokenizer, load_weights
from tiny_run import save_tiny_model, write_dialogues

DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ONCE = [{"Sequence": {"id": "A", "type_id": 0}}]
TWICE = {"type": "TemplateProcessing", "single": 2 * ONCE, "pair": 2 * ONCE, "special_tokens": {}}


def charsmap(replacement: str) -> str:
    return base64.b64encode(struct.pack("<I", 8) + bytes(8) + replacement.encode() + b"\0").decode()


def sequence(name: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


BOUNDARY = {"type": "Replace", "pattern": {"Regex": r"\b"}, "content": "aaa"}
LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 5000}
GROWING = {
    "texts that double": {"normalizer": sequence("normalizers", 40 * [DOUBLES])},
    "lists in lists": {
        "normalizer": sequence("normalizers", 4 * [sequence("normalizers", 10 * [DOUBLES])])
    },
    "matches of nothing": {"normalizer": sequence("normalizers", 10 * [BOUNDARY])},
    "one long replacement": {"normalizer": LONG},
    "a table of characters": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("b" * 5000)}
    },
    "bytes of bytes": {"normalizer": sequence("normalizers", 40 * [{"type": "ByteLevel"}])},
    "bytes of bytes of words": {"pre_tokenizer": sequence("pretokenizers", 40 * [BYTES])},
    "tokens that double": {"post_processor": sequence("processors", 40 * [TWICE])},
    "a decoder": {"decoder": sequence("decoders", 40 * [DOUBLES])},
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def change_tokenizer(model: Path, change: dict[str, Any]) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("kind", GROWING)
def test_a_tokenizer_that_makes_texts_longer_and_longer_is_refused(kind: str, model: Path) -> None:
    change_tokenizer(model, GROWING[kind])
    with pytest.raises(
        ModelError,
        match=r"tokenizer\.json may make a text .* times as long, and at most 1,000 times",
    ):
        load_tokenizer(ModelConfig(source=str(model)))


def test_check_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dialogues(Path("sft.jsonl"))
    change_tokenizer(model, {"normalizer": sequence("normalizers", 40 * [DOUBLES])})
    assert main(["check", "sft.jsonl", "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert "1,099,511,627,776 times as long" in error
    assert "Traceback" not in error


def test_the_steps_of_usual_tokenizers_are_read(model: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"type": "NFC"},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
    ]
    decoder = sequence(
        "decoders",
        [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}],
    )
    change_tokenizer(model, {"normalizer": sequence("normalizers", steps), "decoder": decoder})
    load_tokenizer(ModelConfig(source=str(model)))


def write_index(model: Path, file: Any) -> None:
    (model / "model.safetensors").rename(model / "part.safetensors")
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../other/part.safetensors", "/etc/passwd", "parts/../../part.safetensors", 7, None]
)
def test_an_index_that_leads_outside_is_refused(file: Any, model: Path) -> None:
    write_index(model, file)
    with pytest.raises(ModelError, match=r"no file inside of .*: copy the model again"):
        load(model)


def test_an_index_of_a_file_that_is_missing_names_it(model: Path) -> None:
    write_index(model, "gone.safetensors")
    with pytest.raises(ModelError, match=r"names gone\.safetensors, which .* does not have"):
        load(model)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[" * 100_000]
)
def test_an_index_that_is_none_is_refused(text: str, model: Path) -> None:
    write_index(model, "part.safetensors")
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="copy it again"):
        load(model)


def test_an_index_beside_whole_weights_is_not_used(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{")
    load(model)


@pytest.mark.parametrize("text", ["{}", "{", "[" * 100_000, '{"weight_map": {"a": 3}}'])
def test_an_index_in_the_hubs_cache_is_refused_as_in_a_directory(
    text: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(model, "part.safetensors")
    (model / "model.safetensors.index.json").write_text(text)
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    entry = cache / "models--someone--m"
    shutil.copytree(model, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    for module in (constants, transformers_hub):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(module, name, str(cache), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    described = ModelConfig(source="someone/m")
    with pytest.raises(ModelError, match=r"copy (it|the model) again"):
        load_weights(described, load_config(described), dtype=torch.float32, attention=None)


def load(model: Path) -> None:
    described = ModelConfig(source=str(model))
    load_weights(described, load_config(described), dtype=torch.float32, attention=None)
