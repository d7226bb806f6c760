"""Compile a model layer by layer with torch.compile.

One compiled function serves all layers of a kind, with any number of tokens. The lengths of samples
differ in every micro-batch, but do not cause compilation: see `prepare_for_compilation`.
"""

import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton

from fitune.errors import ModelError
from fitune.model.fused_linear import cast_weights_before_all_layers
from fitune.model.packed_attention import prepare_for_compilation
from fitune.model.recompute import recomputable_layers


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Make each layer compile at its first forward.

    Raises ModelError if the model or the machine does not support that.
    """
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
    # what an earlier run of this process compiled refers to names that went with its model
    torch.compiler.reset()
    prepare_for_compilation()
    cast_weights_before_all_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
