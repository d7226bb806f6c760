"""Find weights that are not finite.

A file may be damaged, or saved by a run that diverged, and the learning rate may be too large.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor with nan or infinite values, None if there is none."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            return name
    return None


def weights_not_finite(model: nn.Module) -> str | None:
    return first_not_finite(
        (name, parameter.detach()) for name, parameter in model.named_parameters()
    )


def saved_not_finite(directory: Path) -> str | None:
    """Return the first tensor of a saved model's files that is not finite, None if there is none.

    If the files cannot be read, the reason is returned instead.
    """
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
