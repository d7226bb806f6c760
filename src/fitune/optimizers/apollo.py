"""Implements APOLLO, which keeps the state of AdamW for a random projection of each gradient."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: a parameter group of an optimizer, or the state of one parameter
Entries = dict[str, Any]

#: Steps with the same projection; the authors draw a new one as often.
PROJECTION_STEPS = 200
#: An update may be larger than the one before by at most this factor (Chen et al. 2024, Fira,
#: arXiv 2410.01623), as in APOLLO.
MOST_GROWTH = 1.01
#: avoids a division by the norm of a gradient of zeros
TINY = 1e-8


class Variant(NamedTuple):
    """What the two variants of the paper differ in."""

    #: the rank of a projection as a fraction of the gradient's smaller dimension; it is at least 1
    rank_share: float
    #: whether each column of the gradient is scaled by a number of its own
    by_column: bool
    #: a factor of all updates
    scale: float


#: the rank of the paper's pre-training runs
APOLLO = Variant(rank_share=0.25, by_column=True, scale=1.0)
#: the paper's variant of rank 1, with one number for each matrix
APOLLO_MINI = Variant(rank_share=0.0, by_column=False, scale=math.sqrt(128))


class Apollo(torch.optim.Optimizer):
    """Updates matrices by their gradient, scaled by what AdamW would do to a projection of it.

    Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270). For the
    gradient G [M, N] of a matrix with M <= N (else for its transpose), and a random matrix P [R, M]
    whose elements have the variance 1 / R:

        Z = P G,    A = Adam's direction for Z,    s_n = |A_n| / |Z_n| for each column n
        W = (1 - lr decay) W - lr scale s G

    Where columns have no numbers of their own, s is |A| / |Z|. The averages have R N elements
    instead of M N. P is drawn from a seed whenever it is used: it takes no memory between steps,
    and a resumed run draws the same.

    groups: parameter groups of matrices.
    """

    def __init__(
        self,
        groups: list[Entries],
        variant: Variant,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._variant = variant

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the matrices and overwrite their gradients; `closure` is not called."""
        matrices = [(group, matrix) for group in self.param_groups for matrix in group["params"]]
        for number, (group, matrix) in enumerate(matrices):
            if matrix.grad is None:
                continue
            state, is_wide = self.state[matrix], matrix.shape[0] <= matrix.shape[1]
            wide_MN = matrix.grad if is_wide else matrix.grad.T
            # A generator on a CPU takes only 32 bits of its seed.
            seed = int(state.get("step", 0)) // PROJECTION_STEPS * len(matrices) + number
            projected_RN = self._projection(wide_MN, seed=seed) @ wide_MN
            correction = self._scale_gradient(wide_MN, projected_RN, state, group)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(matrix.grad, alpha=-group["lr"] * correction)

    def _scale_gradient(
        self,
        gradient_MN: Tensor,
        projected_RN: Tensor,
        state: Entries,
        group: Entries,
    ) -> float:
        """Overwrite the gradient by the update at a learning rate of 1, without Adam's correction.

        Returns Adam's correction of the bias of its averages. The authors limit the growth of
        updates before it.
        """
        adam_RN, correction = _adam(state, projected_RN, group)
        over = 0 if self._variant.by_column else None
        factor = _norm(adam_RN, over).div_(_norm(projected_RN, over).add_(TINY))
        gradient_MN.mul_(factor.mul_(self._variant.scale).to(gradient_MN.dtype))
        size = _norm(gradient_MN, None)
        if "size" not in state:
            state["size"] = torch.zeros_like(size)
        # It is 0 before the first update, which nothing limits.
        before = state["size"]
        growth = torch.where(before > 0, size / (before * MOST_GROWTH), 1).clamp_(min=1)
        gradient_MN.div_(growth.to(gradient_MN.dtype))
        before.copy_(size / growth)
        return correction

    def _projection(self, gradient_MN: Tensor, *, seed: int) -> Tensor:
        """Return the random matrix P [R, M]."""
        rank = max(1, round(self._variant.rank_share * gradient_MN.shape[0]))
        device = gradient_MN.device
        generator = torch.Generator(device).manual_seed(seed)
        drawn_RM = torch.randn(rank, gradient_MN.shape[0], generator=generator, device=device)
        return drawn_RM.mul_(rank**-0.5).to(gradient_MN.dtype)


def _adam(state: Entries, gradient: Tensor, group: Entries) -> tuple[Tensor, float]:
    """Update Adam's averages; return its direction, and the factor that corrects their bias."""
    if "step" not in state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(gradient) for _ in range(2))
    state["step"] += 1
    (first, second), step = group["betas"], state["step"].item()
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
    return direction, math.sqrt(1 - second**step) / (1 - first**step)


def _norm(tensor: Tensor, dim: int | None) -> Tensor:
    """Return the Euclidean norm in float32, of all elements or along a dimension."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float32)
    return norm
