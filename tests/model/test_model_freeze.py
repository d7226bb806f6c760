"""Layers that are trained while the others are frozen."""

import copy

import pytest
import torch

from fitune.config import FreezeConfig
from fitune.errors import ModelError
from fitune.model.freeze import freeze
from fitune.model.load import build_model
from tiny_models import TINY_LLAMA


def trained(settings: FreezeConfig, *, tied: bool = False) -> set[str]:
    config = copy.deepcopy(TINY_LLAMA)
    config.tie_word_embeddings = tied
    model = build_model(config, dtype=torch.bfloat16)
    freeze(model, settings)
    parameters = dict(model.named_parameters())
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters.values() if not p.requires_grad} <= {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    return {name.removeprefix("model.") for name, p in parameters.items() if p.requires_grad}


def test_the_last_or_the_first_layers_are_trained() -> None:
    last, first = (trained(FreezeConfig(trained_layers=count)) for count in (1, -1))
    assert {name.split(".")[1] for name in last} == {"1"}
    assert {name.replace("layers.1.", "layers.0.") for name in last} == first
    assert "layers.1.input_layernorm.weight" in last


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_layers_and_parts_beside_them_are_trained(tied: bool) -> None:
    settings = FreezeConfig(
        trained_layers=1, trained_modules=("mlp",), extra_modules=("norm", "lm_head")
    )
    mlp = {f"layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    head = "embed_tokens.weight" if tied else "lm_head.weight"
    assert trained(settings, tied=tied) == {*mlp, "norm.weight", head}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (FreezeConfig(trained_layers=3), "is 3, and this model has 2 layers"),
        (FreezeConfig(trained_modules=("attn",)), "names attn, which a layer of it does not have"),
        (FreezeConfig(extra_modules=("mlp",)), "names mlp, which is a part of the layers"),
        (FreezeConfig(extra_modules=("wte",)), "names wte, which it does not have"),
    ],
)
def test_what_the_model_does_not_have_is_refused(settings: FreezeConfig, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        trained(settings)
