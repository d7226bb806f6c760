"""Combines an optimizer for the matrices of hidden layers with AdamW for all other parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer


class HiddenMatrices(Optimizer):
    """Updates hidden matrices by one optimizer, and embeddings, head and vectors by AdamW.

    groups: parameter groups; `hidden_matrices` in each says who updates it.
    build: makes the optimizer of the hidden matrices from their groups.
    lr, betas, eps: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        matrices = [group for group in groups if group["hidden_matrices"]]
        others = [group for group in groups if not group["hidden_matrices"]]
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(build(matrices))
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters; `closure` is not called."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give both parts the groups and the state of this optimizer, which is what is saved."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end
