"""Our writer of safetensors files, read back by the library that the format belongs to."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig

from fitune.config import LoraConfig
from fitune.model import tensor_file
from fitune.model.load import build_model, quiet_transformers
from fitune.model.lora import apply_lora
from fitune.model.save import saved_tensors
from fitune.model.tensor_file import file_hash, write_tensors
from tiny_models import TINY, TINY_LLAMA

TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "float16": torch.randn(2, 1, 3).half(),
    "float64": torch.randn(2).double(),
    "int64": torch.arange(4),
    "uint8": torch.arange(3, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "a number": torch.tensor(4.5),
    "nothing": torch.zeros(0, 3),
    "no piece of memory": torch.randn(4, 6).T,
}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("piece_bytes", [3, 2**24])
def test_tensors_of_every_kind_read_back(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece_bytes)
    digest = write_tensors(tmp_path / "a.safetensors", TENSORS)
    assert_equal(load_file(tmp_path / "a.safetensors"), TENSORS)
    assert digest == file_hash(tmp_path / "a.safetensors")


def test_an_existing_file_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", TENSORS)
    assert (tmp_path / "a").read_bytes() == b"kept"


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_a_model_is_saved_as_transformers_would(config: PretrainedConfig, tmp_path: Path) -> None:
    model = build_model(copy.deepcopy(config), seed=1)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    name, tensors = saved_tensors(model)
    assert_equal(tensors, load_file(tmp_path / name))


def test_adapters_are_saved_as_peft_would(tmp_path: Path) -> None:
    model = apply_lora(build_model(copy.deepcopy(TINY_LLAMA), seed=1), LoraConfig())
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    name, tensors = saved_tensors(model)
    assert_equal(tensors, load_file(tmp_path / name))
