"""Save adapters that started with a part of the frozen weights (PiSSA, OLoRA) as ordinary LoRA.

W is the frozen weight in the files, s the scaling, B0 A0 the start of the adapters. The model
computes (W - s B0 A0) + s B A, and W + s [B, -B0] [A; A0] is the same with adapters of twice the
rank, which anyone can load onto the model in the files. peft converts by the same formula
(`LoraModel.subtract_mutated_init`), with a second set of adapters on the device.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    # The import takes half a second and is needed for adapters only.
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel

_ATTRIBUTE = "_fitune_adapter_start"


def note_start(adapted: "PeftModel") -> None:
    """Keep a copy of both factors of each adapter in the host's memory, as they are now."""
    factors = {
        name.replace(".default.", "."): parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in adapted.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    setattr(adapted, _ATTRIBUTE, factors)


def _start(adapted: nn.Module) -> Mapping[str, torch.Tensor]:
    return cast(Mapping[str, torch.Tensor], getattr(adapted, _ATTRIBUTE, {}))


def as_lora(adapted: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return adapters, named as peft saves them, for the model in the files.

    They are `tensors` themselves unless they started with a part of the frozen weights.
    """
    start = _start(adapted)
    converted = dict(tensors)
    for name, first in start.items():
        now = tensors[name].detach().to("cpu", torch.float32)
        is_first_factor = ".lora_A." in name
        converted[name] = (
            torch.cat([now, first], dim=0) if is_first_factor else torch.cat([now, -first], dim=1)
        )
    return converted


def lora_settings(adapted: "PeftModel") -> "PeftLoraConfig":
    """Return peft's settings for what `as_lora` returns, as `PeftModel.save_pretrained` has them."""
    settings = deepcopy(cast("PeftLoraConfig", adapted.peft_config["default"]))
    settings.base_model_name_or_path = adapted.base_model.model.name_or_path or None
    settings.inference_mode = True
    if _start(adapted):
        settings.init_lora_weights = True
        settings.r *= 2
        settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2
    return settings
