"""Save adapters that started with a part of the frozen weights (PiSSA, OLoRA) as ordinary LoRA.

W is the frozen weight in the files, s the scaling, B0 A0 the start of the adapters. The model
computes (W - s B0 A0) + s B A, and W + s [B, -B0] [A; A0] is the same with adapters of twice the
rank, which anyone can load onto the model in the files. peft converts by the same formula
(`LoraModel.subtract_mutated_init`), with a second set of adapters on the device.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file
from torch import nn

from fitune.errors import ModelError

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


def lora_settings(adapted: "PeftModel") -> "PeftLoraConfig | None":
    """Return peft's settings for what `as_lora` returns; None if they are the model's own."""
    if not _start(adapted):
        return None
    settings = deepcopy(cast("PeftLoraConfig", adapted.peft_config["default"]))
    settings.init_lora_weights = True
    settings.r *= 2
    settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2
    settings.inference_mode = True
    return settings


def check_start(adapted: nn.Module, saved: Path) -> None:
    """Raise ModelError if adapters saved by `as_lora` started with other values than `adapted`.

    The decomposition of a weight may give other vectors on another processor or with another
    release of PyTorch; trained adapters do not fit what then remains of the weight.
    """
    start = _start(adapted)
    if not start:
        return
    tensors = load_file(saved)
    for name, first in start.items():
        is_first_factor = ".lora_A." in name
        rank = first.shape[0 if is_first_factor else 1]
        was = tensors[name][-rank:] if is_first_factor else -tensors[name][:, -rank:]
        if not torch.equal(was, first):
            raise ModelError(
                "model.lora.init decomposes the weights otherwise with this processor or release "
                "of PyTorch than where the run began: resume it there, or merge RUN/last by fitune "
                "export and start a new run"
            )
