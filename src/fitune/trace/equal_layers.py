"""Finds out which layers of a model are equal, so that a recording of a few stands for all.

Two layers are equal if their modules, the shapes of their parameters, the settings that the modules
hold and what the configuration lists for each layer are equal.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.config import Auto, ModelConfig, Recompute
from fitune.model.load import build_model, load_config
from fitune.model.recompute import recompute_period

#: The largest distance between equal layers that is looked for.
_LARGEST_PERIOD = 8
#: Attributes with a layer's own number, which is not compared.
_NUMBER_OF_LAYER = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx")
#: Types of the attributes that are compared.
_SETTING = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class EqualLayers:
    """A list of layers in which, from the second layer on, layer i equals layer i + period."""

    #: the path of the list in the model without adapters
    name: str
    num_layers: int
    period: int


@dataclass(frozen=True, slots=True)
class LayerList:
    """The only list of layers that a model has."""

    name: str
    #: one for each layer; equal layers have equal ones
    signatures: Sequence[object]

    def find_equal(self, recompute: Recompute | Auto) -> EqualLayers | None:
        """Return the shortest period of the layers, None if they do not repeat."""
        num_layers, step = len(self.signatures), recompute_period(recompute)
        for period in range(step, min(_LARGEST_PERIOD, num_layers // 2 - 1) + 1, step):
            # the last layer must be equal too: in a model of the first few layers, an earlier one
            # takes its place
            if all(
                self.signatures[i] == self.signatures[i + period]
                for i in range(1, num_layers - period)
            ):
                return EqualLayers(self.name, num_layers, period)
        return None


def find_layers(model: ModelConfig) -> LayerList | None:
    """Return the model's list of layers, None if it has none or several.

    Raises what `load_config` and `build_model` raise.
    """
    config = load_config(model)
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        return None
    with torch.device("meta"):
        built = build_model(config, trust_remote_code=model.trust_remote_code)
    lists = [(name, part) for name, part in built.named_modules() if _is_layers(part, num_layers)]
    if len(lists) != 1:
        return None
    ((name, layers),) = lists
    listed = _listed(config.get_text_config(), num_layers)
    return LayerList(
        name,
        [(_signature(layer), *(values[i] for values in listed)) for i, layer in enumerate(layers)],
    )


def first_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return the configuration of a model that has the first `num_layers` layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, values in list(vars(text).items()):
        if isinstance(values, (list, tuple)) and len(values) == total:
            setattr(text, name, values[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def _is_layers(part: nn.Module, num_layers: int) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) == num_layers


def _listed(config: PretrainedConfig, num_layers: int) -> list[Sequence[Any]]:
    """Return the settings of which the configuration lists one for each layer."""
    return [
        values
        for name, values in vars(config).items()
        if isinstance(values, (list, tuple))
        and len(values) == num_layers
        and not name.startswith("_")
    ]


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Return what two equal layers have in common."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (key, value)
                for key, value in vars(part).items()
                if isinstance(value, _SETTING) and key not in _NUMBER_OF_LAYER
            ),
            tuple(
                (key, value.shape, value.dtype)
                for key, value in part.named_parameters(recurse=False)
            ),
            tuple(
                (key, value.shape, value.dtype) for key, value in part.named_buffers(recurse=False)
            ),
        )
        for name, part in layer.named_modules()
    )
