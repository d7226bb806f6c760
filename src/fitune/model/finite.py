"""Whether weights are numbers at all: a file may be damaged or of a run that diverged, and a rate may be too large."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds nan or an infinite number."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            return name
    return None


def weights_not_finite(model: nn.Module) -> str | None:
    return first_not_finite(
        (name, parameter.detach()) for name, parameter in model.named_parameters()
    )


def saved_not_finite(directory: Path) -> str | None:
    """As `first_not_finite`, of a saved model's files; the reason where they cannot be read."""
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if (
                    found := first_not_finite((name, file.get_tensor(name)) for name in names)
                ) is not None:
                    return found
    except (OSError, SafetensorError) as error:
        return str(error)
    return None if any(directory.glob("*.safetensors")) else "nothing"
