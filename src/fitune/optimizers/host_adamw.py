"""Implements AdamW with state and update in the host's memory."""

from collections.abc import Callable

import torch
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.AdamW):
    """AdamW that is computed on the processor, with its state in the host's memory.

    This is ZeRO-Offload (arXiv 2101.06840). It saves 8 bytes per parameter on the card, and
    transfers 12 bytes per parameter and step. Parameters and gradients are copied to the host and
    the updated parameters are copied back, so the card's parameters stay the authoritative ones.
    """

    def __init__(
        self, groups: list[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)
        self._on_host: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters; `closure` is not called."""
        with_gradient = [
            [p for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        for parameter in (p for params in with_gradient for p in params):
            if parameter not in self._on_host:
                self._on_host[parameter] = (_like_on_host(parameter), _like_on_host(parameter))
            for host, card in zip(
                self._on_host[parameter], (parameter, parameter.grad), strict=True
            ):
                host.copy_(card, non_blocking=True)
            self._put_state_on_host(parameter)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for group, params in zip(self.param_groups, with_gradient, strict=True):
            on_host = [self._on_host[parameter] for parameter in params]
            states = [self.state[parameter] for parameter in params]
            adamw(
                [host for host, _ in on_host],
                [gradient for _, gradient in on_host],
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
            for parameter, (host, _) in zip(params, on_host, strict=True):
                parameter.copy_(host, non_blocking=True)

    def _put_state_on_host(self, parameter: torch.Tensor) -> None:
        """Allocate the state on the host, or move it there if it was loaded to the card."""
        state = self.state[parameter]
        for name, shape in (
            ("step", ()),
            ("exp_avg", parameter.shape),
            ("exp_avg_sq", parameter.shape),
        ):
            state[name] = (
                state[name].to("cpu", torch.float32) if name in state else torch.zeros(shape)
            )


def _like_on_host(parameter: torch.Tensor) -> torch.Tensor:
    """Allocate host memory for the parameter in float32, pinned if there is a card."""
    return torch.empty(parameter.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
