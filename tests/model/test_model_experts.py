"""model/experts.py: experts compute in the run's format and can be recorded without data."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fitune.model.load import build_model
from tiny_models import TINY

IDS = torch.arange(3, 30)[None]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_compute_what_transformers_computes_one_by_one(name: str) -> None:
    model = build_model(copy.deepcopy(TINY[name]), seed=1).eval()
    grouped = model(IDS).logits
    model.set_experts_implementation("eager")
    assert torch.allclose(model(IDS).logits, grouped, atol=1e-5)


def test_experts_multiply_in_the_format_of_autocast() -> None:
    experts = build_model(copy.deepcopy(TINY["qwen3_moe"])).model.layers[0].mlp.experts
    hidden, index, weights = (
        torch.randn(5, 32),
        torch.zeros(5, 1, dtype=torch.int64),
        torch.ones(5, 1),
    )
    expected = experts(hidden, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = experts(hidden, index, weights)
    rounded.sum().backward()
    assert 0 < (rounded - expected).abs().max() < 0.05 * expected.abs().max()
    assert experts.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_recorded_without_data(name: str, autocast: bool) -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model = build_model(copy.deepcopy(TINY[name])).train()
        model(torch.zeros(1, 27, dtype=torch.int64), use_cache=False).logits.sum().backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
