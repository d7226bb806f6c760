"""Computes squared norms of each micro-batch's gradient while the backward runs.

A hook on a parameter sees the gradient of one backward before it is added to `.grad`, once per
backward, also for tied weights and with gradient checkpointing. It costs one read of the gradient,
and no copy and no wait for the device. These norms and that of their sum give the gradient noise
(batch_size/noise.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fitune.distributed.sharding import Shards, local

#: Weighted norms need two temporaries. They have this size instead of the largest parameter's.
CHUNK_ELEMENTS = 1 << 18
#: A parameter is split into at most so many chunks, because each takes kernel launches.
MOST_PIECES = 64
#: cuBLAS's dot product cannot count so many elements.
CUBLAS_ELEMENTS = 2**31
#: Smaller than every root of a second moment that matters. Adam's own eps would give coordinates
#: without gradient a weight that depends on the batch size.
EPS = 1e-12


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """The squared norms of one step's gradients."""

    #: of each micro-batch's contribution to the gradient
    micro: tuple[float, ...]
    #: of the whole gradient, before clipping
    total: float
    #: the loss weight of each micro-batch
    weights: tuple[float, ...]
    #: gradient . Adam's exp_avg as it was before the step; None if there is no exp_avg
    momentum_dot: float | None = None
    #: the same with squares divided by the root of Adam's exp_avg_sq; None if not recorded
    preconditioned_micro: tuple[float, ...] | None = None
    preconditioned_total: float | None = None


class NormRecorder:
    """Records the gradient norms of one step. A new one is made for each step.

    preconditioned: record weighted norms too, if the optimizer has an exp_avg_sq by now.
    shards: if the model is sharded. Weighted norms are then unknown, because no process has both
        exp_avg_sq and its own gradient as a whole.

    A state in the host's memory (adamw_host) is not read, since it would have to be copied to the
    GPU in every step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        preconditioned: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self._shards = shards
        self._parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        self._exp_avg, squares = (
            _averages(optimizer, "exp_avg"),
            _averages(optimizer, "exp_avg_sq"),
        )
        is_whole = shards is None and len(squares) == len(self._parameters)
        self._exp_avg_sq = squares if preconditioned and is_whole else {}
        self._squares: list[torch.Tensor] = []
        self._weighted: list[torch.Tensor] = []
        self._micro: list[torch.Tensor] = []
        self._weights: list[float] = []
        self._is_alone = False

    @contextmanager
    def reading(self, *, alone: bool = False) -> Iterator[None]:
        """Record the backward of one micro-batch that runs inside this context.

        What an earlier backward left is dropped, unless `keep` was called.

        alone: the micro-batch is the whole step, so its norm is the step's and needs no hooks.
        """
        self._squares, self._weighted = [], []
        self._is_alone = alone and self._shards is None
        if self._is_alone:
            yield
            return
        if self._shards is not None:
            with self._shards.reading(self._add_norm):
                yield
            return
        # Autograd calls hooks without gradients enabled; `torch.no_grad` would only add Python.
        handles = [
            parameter.register_hook(
                partial(self._add, parameter) if self._exp_avg_sq else self._add_norm
            )
            for parameter in self._parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, weight: float) -> None:
        """Keep the norms of the micro-batch that was just recorded.

        weight: its loss weight.
        """
        self._weights.append(weight)
        if not self._is_alone:
            self._micro.append(torch.stack((self._sum(self._squares), self._sum(self._weighted))))

    def forget(self) -> None:
        """Drop all norms, because the step begins again."""
        self._micro, self._weights = [], []

    def recorded(self) -> tuple[torch.Tensor, tuple[float, ...]]:
        """Return the norms and weights of the kept micro-batches.

        The norms are float32 [2 a] on the device for a micro-batches: norm and weighted norm of
        each.
        """
        values = (
            torch.cat(self._micro)
            if self._micro
            else torch.zeros(0, device=self._parameters[0].device)
        )
        return values, tuple(self._weights)

    def take(self, values: Sequence[float], weights: Sequence[float]) -> None:
        """Replace the norms by those of all processes, in the form that `recorded` returns."""
        self._micro = list(torch.tensor(values, device=self._parameters[0].device).reshape(-1, 2))
        self._weights = list(weights)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Return all norms as float32 [2 a + 2] on the device, for a micro-batches.

        These are norm and weighted norm of each micro-batch (none for one that was the whole step),
        the weighted norm of their sum, and its product with Adam's average. Call this after the
        last backward and before clipping.
        """
        grads = [(p, p.grad) for p in self._parameters if p.grad is not None]
        dots = [
            dot
            for p, grad in grads
            if p in self._exp_avg
            for dot in _dots(local(grad), local(self._exp_avg[p]))
        ]
        weighted = [
            _weighted_square(grad, self._exp_avg_sq[p]) for p, grad in grads if self._exp_avg_sq
        ]
        totals = torch.stack((self._sum(weighted), self._sum(dots)))
        if self._shards is not None:
            self._shards.add_up(totals)
        return torch.cat((*self._micro, totals))

    def read(
        self, host: Sequence[float], *, total_norm: float, scale: float = 1.0
    ) -> GradientNorms:
        """Convert `values()`, copied to the host, to the norms.

        scale: the gradient scaler's factor, which every backward's gradient contains and which has
            been divided out of their sum.
        """
        *micro, weighted_total, dot = host
        norms = (
            [total_norm**2, weighted_total]
            if self._is_alone
            else [value / scale**2 for value in micro]
        )
        return GradientNorms(
            micro=tuple(norms[0::2]),
            total=total_norm**2,
            weights=tuple(self._weights),
            momentum_dot=dot if self._exp_avg else None,
            preconditioned_micro=tuple(norms[1::2]) if self._exp_avg_sq else None,
            preconditioned_total=weighted_total if self._exp_avg_sq else None,
        )

    def _add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        self._add_norm(gradient)
        self._weighted.append(_weighted_square(gradient, self._exp_avg_sq[parameter]))

    def _add_norm(self, gradient: torch.Tensor) -> None:
        self._squares.append(_square(gradient))

    def _sum(self, values: list[torch.Tensor]) -> torch.Tensor:
        return (
            torch.stack(values).sum()
            if values
            else torch.zeros((), device=self._parameters[0].device)
        )


def _averages(optimizer: torch.optim.Optimizer, name: str) -> dict[torch.Tensor, torch.Tensor]:
    """Return that part of the state by parameter, if it is on the device.

    It is empty if some parameters have another state, or the average of a projection.
    """
    averages = {p: state.get(name) for p, state in optimizer.state.items() if state}
    is_known = all(
        isinstance(average, torch.Tensor)
        and average.device == p.device
        and average.shape == p.shape
        for p, average in averages.items()
    )
    return averages if is_known else {}


def _square(gradient: torch.Tensor) -> torch.Tensor:
    """Return the squared norm, in float32 and without a copy."""
    if (
        gradient.dtype == torch.float32
        and gradient.is_contiguous()
        and gradient.numel() < CUBLAS_ELEMENTS
    ):
        flat = gradient.view(-1)
        return torch.dot(flat, flat)  # one launch; a norm takes two
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm.square()


def _dots(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Return dot products in float32: of each chunk if the tensors must be converted."""
    if first.dtype == second.dtype == torch.float32 and first.numel() < CUBLAS_ELEMENTS:
        return [torch.dot(first.reshape(-1), second.reshape(-1))]
    pieces = zip(_pieces(first), _pieces(second), strict=True)
    return [torch.dot(a.float(), b.float()) for a, b in pieces]


def _weighted_square(gradient: torch.Tensor, exp_avg_sq: torch.Tensor) -> torch.Tensor:
    """Return sum of g^2 / sqrt(v).

    A constant factor, such as v's missing bias correction, cancels in every ratio. Where v is 0,
    before the first update or in an embedding row until its token appears, the weight is 0: 1 / EPS
    would outweigh everything else for the rest of the run.
    """
    pieces = zip(_pieces(gradient), _pieces(exp_avg_sq), strict=True)
    return torch.stack([_weighted_piece(*piece) for piece in pieces]).sum()


def _weighted_piece(gradient: torch.Tensor, exp_avg_sq: torch.Tensor) -> torch.Tensor:
    weighted = gradient.float().square().mul_(exp_avg_sq > 0)
    return weighted.div_(exp_avg_sq.float().sqrt().add_(EPS)).sum()


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor.reshape(-1), max(CHUNK_ELEMENTS, -(-tensor.numel() // MOST_PIECES)))
