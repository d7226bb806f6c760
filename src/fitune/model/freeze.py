"""Train some layers of a model and freeze the others, as LLaMA-Factory's `finetuning_type: freeze`."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fitune.config import FreezeConfig
from fitune.errors import ModelError
from fitune.model.trained_whole import compute_in_float32


def freeze(model: PreTrainedModel, settings: FreezeConfig) -> None:
    """Freeze all of a model but the configured layers, which become float32, in place.

    In 16 bits most updates would be smaller than half the distance of two numbers. Raises
    ModelError for parts that the model does not have.
    """
    dtype = next(model.parameters()).dtype
    trained = _trained_parts(model, settings)
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)
    if dtype == torch.float32:
        return
    for module in model.modules():
        own = [each for each in module.parameters(recurse=False) if each.requires_grad]
        for parameter in own:
            parameter.data = parameter.data.float()
        if own:
            compute_in_float32(module, dtype)


def _trained_parts(model: PreTrainedModel, settings: FreezeConfig) -> list[nn.Module]:
    layers, count = _layers(model), settings.trained_layers
    if abs(count) > len(layers):
        raise ModelError(
            f"model.freeze.trained_layers is {count}, and this model has {len(layers)} layers: "
            "lower it"
        )
    trained = layers[len(layers) - count :] if count >= 0 else layers[: abs(count)]
    if settings.trained_modules != "all":
        names = settings.trained_modules
        trained = [part for name in names for part in _parts(trained, name, "a layer of it")]
    inside = {module for layer in layers for module in layer.modules()}
    for name in settings.extra_modules:
        found = [part for part in _parts([model], name, "it") if part not in inside]
        if not found:
            raise ModelError(
                f"model.freeze.extra_modules names {name}, which is a part of the layers: name it "
                "in model.freeze.trained_modules"
            )
        trained += found
    return trained


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ModelError(
        "model.method freeze needs a list of layers, and this model has none: use lora"
    )


def _parts(modules: list[nn.Module], name: str, where: str) -> list[nn.Module]:
    """Return the parts of this last name. Raises ModelError if there are none."""
    found = [
        part
        for module in modules
        for path, part in module.named_modules()
        if path.rpartition(".")[2] == name
    ]
    if not found:
        raise ModelError(
            f"model.freeze names {name}, which {where} does not have: give the last names of parts, "
            "such as mlp or embed_tokens"
        )
    return found
