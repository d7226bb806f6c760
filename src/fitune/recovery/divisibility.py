"""Whether a model's loss may be computed in parts: seen on two rows before the first step, said in one line.

What cannot be cut is a model whose rows depend on each other, or a loss that is not a sum over targets divided by the
number that it is given: then accumulation gives another gradient than the whole batch, with this or any other trainer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from fitune.distributed.sharding import Shards
from fitune.step.random_state import seed_streams, streams_kept

SAMPLED = 4096
"""Elements of each parameter's gradient that are compared, evenly spaced: two whole gradients would need memory."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.05
"""In 16 bits."""
T = TypeVar("T")


@dataclass(frozen=True)
class ProbeSamples(Generic[T]):
    """Two rows of very different numbers of targets, together and alone. masked: a row without any target, or None.
    loss_weight: of both together."""

    both: T
    first: T
    second: T
    masked: T | None
    loss_weight: float


@dataclass(frozen=True)
class Verdict:
    """exact: whether every split has the whole batch's gradient. reason: one clause, empty where nothing is to be
    said."""

    exact: bool
    reason: str = ""


def check_model(
    model: nn.Module,
    loss_share: Callable[[T, float], Tensor],
    probe: ProbeSamples[T],
    *,
    mean_by: Literal["loss function", "forward"] = "loss function",
    shards: Shards | None = None,
) -> Verdict:
    """loss_share(part, N): the part's sum of target losses divided by N, with its graph. mean_by: who takes the mean
    where the loss turns out to be one. shards: of a model that several processes check together, each with both rows.

    Parameters, `.grad` (None), buffers, mode and random streams are afterwards what they were before.
    """
    device = next(model.parameters()).device
    with streams_kept(device), _buffers_kept(model) as changed_modules:
        look = _Looker(model, loss_share, device, shards)
        loss, gradient = look(probe.both, probe.loss_weight)
        if not math.isfinite(loss):
            return Verdict(False, f"the loss of two ordinary samples is {loss}")
        again, _ = look(probe.both, probe.loss_weight)
        if again != loss:
            return Verdict(
                False,
                f"two identical calls gave losses {loss:.6g} and {again:.6g}: the model keeps a state",
            )
        if reason := _not_a_sum(look, probe, loss, model, mean_by):
            return Verdict(False, reason)
        if probe.masked is not None:
            masked, _ = look(probe.masked, probe.loss_weight)
            if not math.isfinite(masked) or abs(masked) > look.tolerance:
                return Verdict(
                    False, f"a sample without targets has the loss {masked:.4g} instead of 0"
                )
        changed = ", ".join(changed_modules())
        error = _additive_error(look, probe, gradient)
        if error <= look.tolerance:
            kept = (
                f"{changed} change buffers in every forward, also when samples are only split"
                if changed
                else ""
            )
            return Verdict(True, kept)
        if changed:
            return Verdict(
                False,
                f"samples of a micro-batch are mixed by {changed}: the gradient is {error:.0%} off",
            )
        was_training = model.training
        model.eval()
        try:
            _, gradient = look(probe.both, probe.loss_weight)
            only_in_training = _additive_error(look, probe, gradient) <= look.tolerance
        finally:
            model.train(was_training)
        if only_in_training:
            return Verdict(True, "dropout draws other masks for another split")
        return Verdict(
            False, f"samples of a micro-batch depend on each other: the gradient is {error:.0%} off"
        )


class _Looker(Generic[T]):
    """One forward and backward: the loss, and a sample of the gradient."""

    def __init__(
        self,
        model: nn.Module,
        loss_share: Callable[[T, float], Tensor],
        device: torch.device,
        shards: Shards | None,
    ) -> None:
        self._model, self._loss_share, self._device, self._shards = (
            model,
            loss_share,
            device,
            shards,
        )
        dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        self.tolerance = TOLERANCE.get(dtype, COARSE_TOLERANCE)

    def __call__(self, part: T, loss_weight: float) -> tuple[float, Tensor]:
        seed_streams(0, self._device)
        loss = self._loss_share(part, loss_weight)
        if loss.dtype != torch.float32 or torch.is_autocast_enabled(self._device.type):
            self.tolerance = max(self.tolerance, COARSE_TOLERANCE)
        if loss.requires_grad:
            loss.backward()
        samples = []
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                values = parameter if parameter.grad is None else parameter.grad
                if self._shards is not None:
                    values = self._shards.whole(values)
                sample = values.detach().flatten()[:: max(1, parameter.numel() // SAMPLED)].float()
                samples.append(
                    sample.clone() if parameter.grad is not None else torch.zeros_like(sample)
                )
            parameter.grad = None
        value = loss.item() if self._shards is None else self._shards.peers.exchange(loss.item())[0]
        return value, torch.cat(samples)


def _not_a_sum(
    look: _Looker[T],
    probe: ProbeSamples[T],
    loss: float,
    model: nn.Module,
    mean_by: Literal["loss function", "forward"],
) -> str | None:
    """With N doubled a sum of losses is halved, a mean stays, and what is added to it shows as what is too much."""
    doubled, _ = look(probe.both, 2 * probe.loss_weight)
    added = 2 * doubled - loss
    small = max(look.tolerance, 1e-6) * abs(loss)
    if not abs(added) > small:
        return None
    if abs(doubled - loss) <= small:
        if mean_by == "forward":
            return (
                "the model's forward ignores the token count (num_items_in_batch): "
                "its loss is a mean of its own samples"
            )
        return "the loss function takes the mean of its own samples, so that parts add up to a mean of means"
    router = any(
        getattr(getattr(model, "config", None), name, None)
        for name in ("output_router_logits", "aux_loss")
    )
    what = "the auxiliary loss of a mixture of experts" if router else "something"
    return (
        f"{what} ({added:.4g}) is added to the loss of every part, whatever its number of targets"
    )


def _additive_error(look: _Looker[T], probe: ProbeSamples[T], gradient: Tensor) -> float:
    """|g(a and b) - g(a) - g(b)| / |g(a and b)|."""
    _, first = look(probe.first, probe.loss_weight)
    _, second = look(probe.second, probe.loss_weight)
    return float((gradient - first - second).norm() / gradient.norm().clamp_min(1e-30))


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Yields a function that names the classes of the modules whose buffers have changed so far."""
    copies: list[tuple[nn.Module, str, Any, int, Tensor]] = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def changed() -> list[str]:
        return sorted(
            {
                type(module).__name__
                for module, name, buffer, version, _ in copies
                if buffer._version != version
            }
        )

    try:
        yield changed
    finally:
        with torch.no_grad():
            for module, name, buffer, _, values in copies:
                module._buffers[name] = buffer
                buffer.copy_(values)
