"""model/head.py: hidden states and a head that together give the model's own logits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Cohere2Config, GraniteConfig, PhiConfig, PretrainedConfig

from fitune.config import LoraConfig
from fitune.model.head import Head, decoder_and_head
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from tiny_models import TINY

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = TINY | {
    "granite": GraniteConfig(**_SMALL, logits_scaling=4.0),
    "cohere2": Cohere2Config(**_SMALL, logit_scale=0.25),
    "phi": PhiConfig(**_SMALL),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_and_head_give_the_logits_of_the_model(name: str) -> None:
    model = build_model(copy.deepcopy(CONFIGS[name]), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(
                torch.linspace(0, 0.1, parameter.numel()).view_as(parameter)
            )  # biases, large logits
    head = decoder_and_head(model)
    assert isinstance(head, Head)
    ids = torch.arange(3, 20)[None]
    ours = head.logits(head.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    assert torch.allclose(ours, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_adapters_stay_in_the_decoder() -> None:
    model = apply_lora(build_model(copy.deepcopy(TINY["qwen3"])), LoraConfig())
    head = decoder_and_head(model)
    assert isinstance(head, Head)
    assert any("lora_A" in name for name, _ in head.decoder.named_parameters())


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_model_without_data_is_cut_too(where: str) -> None:
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        model = build_model(copy.deepcopy(TINY["gemma2"]))
        head = decoder_and_head(model)
    assert isinstance(head, Head)
    assert head.soft_cap == 3.0


def test_logits_that_are_computed_otherwise_are_noticed() -> None:
    model = build_model(copy.deepcopy(TINY["qwen3"]))
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    assert "does not know" in str(decoder_and_head(model))


def test_a_head_that_is_not_linear_is_unknown() -> None:
    model = build_model(copy.deepcopy(TINY["qwen3"]))
    model.lm_head = nn.Sequential(model.lm_head)
    assert "no plain linear head" in str(decoder_and_head(model))
