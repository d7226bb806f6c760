"""Builds the optimizer of a run over the model's trainable parameters."""

from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel

from fitune.config import OptimConfig
from fitune.errors import ConfigError
from fitune.optimizers.table import OPTIMIZERS, Group, Groups


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """Build the optimizer at the peak rate `lr`, for a run on `device`.

    Vectors (norms, biases) take no weight decay, as is usual since GPT-2. A recording has a model
    of fake tensors; its optimizer is the stand-in, if the optimizer has one. Raises ConfigError if
    the optimizer's library is not installed, or if the optimizer needs a GPU and `device` is a CPU.
    """
    kind = OPTIMIZERS[optim.name]
    if device.type == "cpu" and kind.needs_card is not None:
        raise ConfigError([f"optim.name={optim.name} {kind.needs_card}"])
    decayed = [p for p in _trainable(model) if p.ndim >= 2]
    plain = [p for p in _trainable(model) if p.ndim < 2]
    groups: Groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, optim.weight_decay), (plain, 0.0))
        if params
    ]
    if kind.parts_matrices:
        groups = [part for group in groups for part in _matrices_apart(model, group)]
    build = (
        kind.stand_in
        if kind.stand_in is not None and is_fake(next(model.parameters()))
        else kind.build
    )
    return build(groups, optim, lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _matrices_apart(model: nn.Module, group: Group) -> Iterator[Group]:
    """Yield a group in two parts: the matrices of hidden layers, and all else."""
    at_the_ends = {
        parameter
        for module in _embeddings_and_head(model)
        for parameter in module.parameters(recurse=False)
    }
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in group["params"]:
        parts[parameter.ndim == 2 and parameter not in at_the_ends].append(parameter)
    for is_hidden, params in parts.items():
        if params:
            yield {**group, "params": params, "hidden_matrices": is_hidden}


def _embeddings_and_head(model: nn.Module) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for table in (module.get_input_embeddings(), module.get_output_embeddings()):
                if table is not None:
                    # A wrapped one holds the parameters that are trained further down.
                    yield from table.modules()


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
