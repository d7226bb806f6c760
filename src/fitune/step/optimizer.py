"""The optimizer of a run. Fused where torch has it: the same arithmetic without a parameter-sized temporary, which
the `foreach` variant has and which can itself be the peak of a step."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from torch.optim.adamw import adamw

from fitune.config import OptimConfig
from fitune.errors import ConfigError

STATE_COMES_LATE = ("adamw_8bit", "adamw_8bit_paged")
"""Optimizers whose state is not made before the first step (`create_state`), but in its update."""
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


class HostAdamW(torch.optim.AdamW):
    """AdamW computed by the processor, its state in the host's memory (ZeRO-Offload, arXiv 2101.06840): 8 bytes less a
    parameter on the card, for 12 bytes a parameter and step between the two. Parameters and gradients go to the host
    and the parameters come back, so the card's parameters stay the only ones that count."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)
        self._hosted: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """closure: not called."""
        live = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (p for params in live for p in params):
            if parameter not in self._hosted:
                self._hosted[parameter] = (_like_on_host(parameter), _like_on_host(parameter))
            for host, card in zip(self._hosted[parameter], (parameter, parameter.grad), strict=True):
                host.copy_(card, non_blocking=True)
            self._put_state_on_host(parameter)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for group, params in zip(self.param_groups, live, strict=True):
            hosted = [self._hosted[parameter] for parameter in params]
            states = [self.state[parameter] for parameter in params]
            adamw(
                [host for host, _ in hosted],
                [gradient for _, gradient in hosted],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, (host, _) in zip(params, hosted, strict=True):
                parameter.copy_(host, non_blocking=True)

    def _put_state_on_host(self, parameter: torch.Tensor) -> None:
        """A state that was loaded stands where its parameter does."""
        state = self.state[parameter]
        for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            state[name] = state[name].to("cpu", torch.float32) if name in state else torch.zeros(shape)


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
