"""torch.compile, layer by layer: one compiled function serves all layers of a kind, and any number of tokens.

Row lengths, which are others in every micro-batch, compile nothing anew: see `prepare_for_compilation`.
"""

import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton

from fitune.errors import ModelError
from fitune.model.packed_attention import prepare_for_compilation
from fitune.model.recompute import recomputable_layers


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Each layer is compiled at its first forward. Raises ModelError where the model or the machine cannot do that."""
    layers = recomputable_layers(model)
    if not layers:
        raise ModelError(
            "model.compile needs layers that transformers marks as such, which this model lacks: drop it"
        )
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ModelError(
            "model.compile needs a C++ compiler on a CPU, and none is installed: install g++, or drop it"
        )
    if device.type == "cuda" and not has_triton():
        raise ModelError(
            "model.compile needs Triton on CUDA, which is not installed: pip install triton, or drop it"
        )
    prepare_for_compilation()
    for layer in layers:
        layer.compile(dynamic=True)
