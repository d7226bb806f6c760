"""The attention of packed samples in one autograd function computes what the model's own layer computes. A stand-in
tells of a card, and another one attends in place of its kernel."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fitune.model import fused_linear, varlen
from fitune.model import packed_attention as attention
from fitune.model.fused import fuse_layers
from fitune.model.packed_attention import row_boundaries
from fitune.model.recompute import set_recompute
from tiny_models import TINY_GPT2

LENGTHS = (5, 1, 9, 3)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FUSED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {"sliding_window": 3, "head_dim": 16},
}
OWN: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "attn_logit_softcapping": 50.0},
    "Glm4": {"head_dim": 8, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "Phi3": {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0},
}


def build(name: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **(FUSED | OWN)[name], **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME
    ).train()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def attend(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, samples: varlen.PackedSamples
) -> Tensor:
    """Each sample alone, in float32, with a mask of its window."""
    found = []
    for query, key, value in zip(
        *(each.float().split(LENGTHS) for each in (query_THD, key_TGD, value_TGD)), strict=True
    ):
        seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
        if samples.window is not None:
            seen &= ~seen.tril(-samples.window)
        parts = (each.transpose(0, 1)[None] for each in (query, key, value))
        out = scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=samples.scale, enable_gqa=True
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found).to(query_THD.dtype)


class KernelsOnCpu(varlen.VarlenKernels):
    calls = 0

    def attend(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        KernelsOnCpu.calls += 1
        nothing = torch.zeros(0)
        return attend(*arguments), nothing, nothing

    def differentiate(self, grad: Tensor, saved: Any, samples: varlen.PackedSamples) -> Any:
        parts = [each.detach().requires_grad_() for each in saved[:3]]
        with torch.enable_grad():
            out = attend(*parts, samples)
        return torch.autograd.grad(out, parts, grad)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda _: (8, 9))
    monkeypatch.setattr(
        fused_linear, "_float32_product", lambda first, second: first.float() @ second.float()
    )
    monkeypatch.setattr(varlen, "kernels", lambda: KernelsOnCpu(None, None))
    monkeypatch.setattr(KernelsOnCpu, "calls", 0)


def loss_and_gradients(
    model: nn.Module, *, autocast: bool, kernel: Any = None
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    tokens = torch.arange(sum(LENGTHS))[None] % 61
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    boundaries = row_boundaries(LENGTHS, device=torch.device("cpu"), kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(
            input_ids=tokens, position_ids=positions, use_cache=False, row_boundaries=boundaries
        ).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert len(boundaries.visits) >= 2
    return loss.detach(), [each.grad for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize("name", FUSED)
def test_the_loss_and_the_gradients_are_as_near_to_float32_as_the_model_s_own(
    name: str, card: None
) -> None:
    exact_loss, exact = loss_and_gradients(build(name), autocast=False, kernel="rows")
    own_loss, own = loss_and_gradients(build(name), autocast=True, kernel="rows")
    model = build(name)
    fuse_layers(model)
    loss, gradients = loss_and_gradients(model, autocast=True)
    assert KernelsOnCpu.calls == 2, "once in each layer"
    assert abs(loss - exact_loss) <= 2 * abs(own_loss - exact_loss) + 1e-3 * exact_loss
    for gradient, expected, mine in zip(gradients, exact, own, strict=True):
        assert gradient.shape == expected.shape
        assert (gradient - expected).norm() <= 2 * (mine - expected).norm() + 2e-3 * expected.norm()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_layers_have_the_same_gradients(recompute: Any, card: None) -> None:
    model = build("Llama")
    fuse_layers(model)
    expected = [each.clone() for each in loss_and_gradients(model, autocast=True)[1]]
    set_recompute(model, recompute)
    found = loss_and_gradients(model, autocast=True)[1]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def replaced(model: nn.Module) -> int:
    fuse_layers(model)
    return sum("fused" in module.__dict__ for module in model.modules())


def test_only_attention_that_was_seen_to_be_plain_is_replaced() -> None:
    assert {name: replaced(build(name)) for name in FUSED} == dict.fromkeys(FUSED, 2)
    assert {name: replaced(build(name)) for name in OWN} == dict.fromkeys(OWN, 0)
    assert not replaced(transformers.AutoModelForCausalLM.from_config(TINY_GPT2))
    assert not replaced(build("Llama", attention_dropout=0.1))


def test_what_a_layer_asks_for_is_read_from_the_layer() -> None:
    model = build("Mistral")
    fuse_layers(model)
    asked = model.model.layers[0].self_attn.fused.asked
    assert (asked.head_dim, asked.scale, asked.window) == (16, 0.25, 3)


@pytest.mark.parametrize("kernel", ["rows", None])
def test_elsewhere_the_model_s_own_attention_runs(kernel: Any, card: None) -> None:
    """With another kernel, and without autocast."""
    model, own = build("Llama"), build("Llama")
    fuse_layers(model)
    autocast = kernel is not None
    loss, _ = loss_and_gradients(model, autocast=autocast, kernel="rows")
    expected, _ = loss_and_gradients(own, autocast=autocast, kernel="rows")
    assert KernelsOnCpu.calls == 0
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_padded_samples_take_the_model_s_own_attention(card: None) -> None:
    model = build("Llama")
    fuse_layers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False).logits.sum().backward()
    assert KernelsOnCpu.calls == 0
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_copy_computes_with_its_own_weights(card: None) -> None:
    model = build("Llama")
    fuse_layers(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data *= 2
    losses = [loss_and_gradients(each, autocast=True)[0] for each in (model, other)]
    assert KernelsOnCpu.calls == 4
    assert losses[0] != losses[1]
