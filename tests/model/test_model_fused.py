"""Layers in fewer kernels compute what the model's own layers compute. A stand-in tells of a card: the same torch
operators run on the CPU."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.model import fused_linear
from fitune.model import packed_attention as attention
from fitune.model.fused import fuse_layers
from tiny_models import TINY_QWEN3_NEXT

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "glm4": ("Glm4Config", {"head_dim": 8, "partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "qwen3_next": ("Qwen3NextConfig", TINY_QWEN3_NEXT | {"head_dim": 8}),
    "bamba": (
        "BambaConfig",
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_chunk_size": 8},
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0}),
}


def build(name: str) -> Any:
    config_class, more = MODELS[name]
    config = getattr(transformers, config_class)(**SIZES, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).train()
    for parameter in model.parameters():  # weights of norms are all ones when they are new
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def losses_and_gradients(model: nn.Module, *, autocast: bool) -> tuple[Tensor, list[Tensor]]:
    tokens = torch.arange(2 * 12).reshape(2, 12) % 61
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), [
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda _: (8, 9))
    monkeypatch.setattr(
        fused_linear, "_float32_product", lambda first, second: first.float() @ second.float()
    )


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_model_s_own(name: str, card: None) -> None:
    own, fused = build(name), build(name)
    fuse_layers(fused)
    (own_loss, own_gradients), (loss, gradients) = (
        losses_and_gradients(m, autocast=False) for m in (own, fused)
    )
    assert torch.allclose(loss, own_loss, rtol=1e-6)
    for gradient, expected in zip(gradients, own_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_in_16_bits_the_difference_is_one_of_rounding(
    name: str, dtype: torch.dtype | None, card: None
) -> None:
    """Both are as far from float32 as each other. dtype: of the parameters, None for autocast."""
    exact_loss, exact = losses_and_gradients(build(name), autocast=False)
    own, fused = build(name).to(dtype), build(name).to(dtype)
    fuse_layers(fused)
    (own_loss, own_gradients), (loss, gradients) = (
        losses_and_gradients(m, autocast=not dtype) for m in (own, fused)
    )
    assert abs(loss - exact_loss) <= 2 * abs(own_loss - exact_loss) + 1e-3 * exact_loss
    for gradient, expected, mine in zip(gradients, exact, own_gradients, strict=True):
        assert (gradient - expected).norm() <= 2 * (mine - expected).norm() + 2e-3 * expected.norm()


def replaced(name: str) -> set[str]:
    model = build(name)
    fuse_layers(model)
    return {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}


def test_only_what_was_seen_to_compute_the_same_is_replaced() -> None:
    assert replaced("llama") == {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP", "Linear"}
    assert replaced("qwen3") == {"Qwen3RMSNorm", "Qwen3Attention", "Qwen3MLP", "Linear"}
    assert replaced("gemma2") == {"Gemma2Attention", "Linear"}, (
        "Gemma's norms multiply by 1 + weight"
    )
    assert "BambaRMSNormGated" not in replaced("bamba"), "it takes a gate too"
    assert "Glm4Attention" not in replaced("glm4"), (
        "GLM turns neighbouring numbers, and only half of them"
    )


def test_a_norm_with_its_epsilon_elsewhere_is_left_as_it_is() -> None:
    class OutsideRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-3

        def forward(self, hidden: Tensor) -> Tensor:
            return self.weight * hidden / (hidden.square().mean(-1, keepdim=True).sqrt() + self.eps)

    model = nn.Sequential(OutsideRMSNorm())
    fuse_layers(model)
    assert "forward" not in model[0].__dict__


def test_without_a_card_the_model_s_own_code_runs() -> None:
    own, fused = build("llama"), build("llama")
    fuse_layers(fused)
    (loss, gradients), (expected, own_gradients) = (
        losses_and_gradients(m, autocast=True) for m in (fused, own)
    )
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, own_gradients, strict=True))


def test_a_copy_of_the_model_computes_with_its_own_weights(card: None) -> None:
    model = build("llama")
    fuse_layers(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data *= 2
    assert not torch.equal(
        *(losses_and_gradients(m, autocast=False)[0].reshape(1) for m in (model, other))
    )
    assert other.model.norm.forward.__self__ is other.model.norm


class CountedProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "biased"), [("llama", False), ("qwen2", True)])
def test_layers_that_share_an_input_are_one_product(name: str, biased: bool, card: None) -> None:
    model = build(name)
    fuse_layers(model)
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == biased
    tokens = torch.arange(12)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16), CountedProducts() as products:
        model.model(input_ids=tokens, use_cache=False)
    assert products.number == 2 * 4, (
        "query, key and value; output; gate and up; down, in each of two layers"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_no_cast_weight_outlives_its_forward(
    fails: bool, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    fuse_layers(model)
    attention = model.model.layers[1].self_attn
    if fails:
        monkeypatch.setattr(attention.v_proj, "forward", lambda _: torch.zeros(0).view(1, 2))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError) if fails else nullcontext(),
    ):
        model(input_ids=torch.arange(12)[None], use_cache=False)
    layers = [module for module in model.modules() if "joined" in module.__dict__]
    assert layers
    assert all(layer.joined.cast is None for layer in layers)
    assert attention.q_proj.shared_input._hidden is None
    assert attention.q_proj.shared_input._ready == []
