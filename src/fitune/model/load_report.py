"""Judge what transformers reports of the weights that it has loaded."""

import re
from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

from fitune.config import ModelConfig
from fitune.errors import ModelError


def check_complete(model: ModelConfig, report: dict[str, Any], surplus: Sequence[str] = ()) -> None:
    """Raise ModelError if weights are missing, have another shape, or are left over.

    surplus: tensors of the file that must have a place in the model.
    """
    faults = [
        f"{name} is {list(found)} in the file and {list(wanted)} in the model"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    faults += [
        listed(what, names)
        for what, names in (("missing", report["missing_keys"]), ("unexpected", surplus))
        if names
    ]
    if faults:
        raise ModelError(
            f"the weights of {model.source} do not fit its architecture: {'; '.join(faults[:4])}"
        )


def of_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names among these that belong to a decoder layer.

    It may be a layer that the configuration omits, or one that lacks such a part in the model.
    Other parts that a file may contain do not count: a vision tower, or the head of another task.
    """
    num_layers = getattr(
        cast(PretrainedConfig, model.config).get_text_config(), "num_hidden_layers", None
    )
    lists = [
        name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == num_layers
    ]
    of_layer = re.compile(
        rf"(?:\w+\.)?(?:{'|'.join(map(re.escape, lists))})\.\d+\." if lists else r"(?!)"
    )
    return [name for name in names if of_layer.match(name)]


def listed(what: str, names: Collection[str]) -> str:
    """Return a number of names, with the first three of them."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} {what} ({first}{', ...' if len(names) > 3 else ''})"
