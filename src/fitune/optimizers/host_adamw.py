"""AdamW whose state and update are in the host's memory."""

from collections.abc import Callable

import torch
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.AdamW):
    """AdamW computed by the processor, its state in the host's memory (ZeRO-Offload, arXiv 2101.06840): 8 bytes less a
    parameter on the card, for 12 bytes a parameter and step between the two. Parameters and gradients go to the host
    and the parameters come back, so the card's parameters stay the only ones that count."""

    def __init__(
        self, groups: list[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)
        self._hosted: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """closure: not called."""
        live = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (p for params in live for p in params):
            if parameter not in self._hosted:
                self._hosted[parameter] = (_like_on_host(parameter), _like_on_host(parameter))
            for host, card in zip(
                self._hosted[parameter], (parameter, parameter.grad), strict=True
            ):
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
        for name, shape in (
            ("step", ()),
            ("exp_avg", parameter.shape),
            ("exp_avg_sq", parameter.shape),
        ):
            state[name] = (
                state[name].to("cpu", torch.float32) if name in state else torch.zeros(shape)
            )


def _like_on_host(parameter: torch.Tensor) -> torch.Tensor:
    """Memory for it in float32, pinned where there is a card."""
    return torch.empty(parameter.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
