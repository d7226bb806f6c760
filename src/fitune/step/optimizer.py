"""The optimizer of a run. Fused where torch has it: the same arithmetic without a parameter-sized temporary, which
the `foreach` variant has and which can itself be the peak of a step."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from fitune.config import OptimConfig
from fitune.errors import ConfigError

_NEEDS_CARD = {
    "adamw_host": "keeps its state in the host's memory, where it is on a CPU anyway: use adamw",
    "adamw_8bit_paged": "moves its state between a card and the host, and here is no card: use adamw_8bit",
}


def build_optimizer(model: nn.Module, optim: OptimConfig, *, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, at the peak rate `lr`, for a run on `device`.

    Vectors (norms, biases) take no weight decay, as is usual since GPT-2. Raises ConfigError if the optimizer's
    library is not installed, and for an optimizer that makes no sense on a CPU.
    """
    if device.type == "cpu" and optim.name in _NEEDS_CARD:
        raise ConfigError([f"optim.name={optim.name} {_NEEDS_CARD[optim.name]}"])
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


def _adamw_host(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return HostAdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps)


def _adamw_8bit(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes import optim as bitsandbytes
    except ImportError as error:
        raise ConfigError(
            [f"optim.name={optim.name} needs bitsandbytes, not installed here: pip install 'fitune[bnb]', or use adamw"]
        ) from error
    kind = bitsandbytes.PagedAdamW8bit if optim.name == "adamw_8bit_paged" else bitsandbytes.AdamW8bit
    return cast(torch.optim.Optimizer, kind(groups, lr=lr, betas=optim.betas, eps=optim.eps))


def _adafactor(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    # torch's Adafactor has no betas; its eps are (None, 1e-3) by design and not Adam's.
    return torch.optim.Adafactor(groups, lr=lr)


def _sgd(groups: Groups, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=optim.betas[0], fused=True)


class HostAdamW(torch.optim.Optimizer):
    """AdamW computed by the processor, its state in the host's memory (ZeRO-Offload, arXiv 2101.06840): 8 bytes less a
    parameter on the card, for 12 bytes a parameter and step between the two. Parameters and gradients go to the host
    and the parameters come back, so the card's parameters stay the only ones that count."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        hosted = [
            {**group, "params": [nn.Parameter(_like_on_host(p)) for p in group["params"]]}
            for group in self.param_groups
        ]
        self._on_host = torch.optim.AdamW(hosted, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pairs = []
        for group, hosted in zip(self.param_groups, self._on_host.param_groups, strict=True):
            hosted.update({name: value for name, value in group.items() if name != "params"})
            pairs += list(zip(group["params"], hosted["params"], strict=True))
        for parameter, host in pairs:
            if parameter.grad is None:
                host.grad = None
                continue
            host.copy_(parameter, non_blocking=True)
            host.grad = _like_on_host(parameter) if host.grad is None else host.grad
            host.grad.copy_(parameter.grad, non_blocking=True)
        if pairs[0][0].is_cuda:
            torch.cuda.synchronize(pairs[0][0].device)
        self._on_host.step()
        for parameter, host in pairs:
            if parameter.grad is not None:
                parameter.copy_(host, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return self._on_host.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._on_host.load_state_dict(state_dict)


def _like_on_host(parameter: torch.Tensor) -> torch.Tensor:
    """Memory for it in float32, pinned where there is a card."""
    return torch.empty(parameter.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())


_BUILDERS: dict[str, Callable[[Groups, OptimConfig, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_foreach": _adamw_foreach,
    "adamw_host": _adamw_host,
    "adamw_8bit": _adamw_8bit,
    "adamw_8bit_paged": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
