"""The optimizer of a run. Fused where torch has it: the same arithmetic without a parameter-sized temporary, which
the `foreach` variant has and which can itself be the peak of a step."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fitune.config import OptimConfig
from fitune.errors import ConfigError


def build_optimizer(model: nn.Module, optim: OptimConfig, *, lr: float) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, at the peak rate `lr`.

    Vectors (norms, biases) take no weight decay, as is usual since GPT-2. Raises ConfigError if the optimizer's
    library is not installed.
    """
    decayed = [p for p in _trainable(model) if p.ndim >= 2]
    plain = [p for p in _trainable(model) if p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, optim.weight_decay), (plain, 0.0))
        if params
    ]
    return _BUILDERS[optim.name](groups, optim, lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


Groups = list[dict[str, object]]


def _adamw(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True)


def _adamw_foreach(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, foreach=True)


def _adamw_8bit(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            ["optim.name=adamw_8bit needs bitsandbytes, not installed here: pip install 'fitune[bnb]', or use adamw"]
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=optim.betas, eps=optim.eps)
    return optimizer


def _adafactor(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    # torch's Adafactor has no betas; its eps are (None, 1e-3) by design and not Adam's.
    return torch.optim.Adafactor(groups, lr=lr)


def _sgd(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=optim.betas[0], fused=True)


_BUILDERS: dict[str, Callable[[Groups, OptimConfig, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_foreach": _adamw_foreach,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
