"""Checks on two samples, before the first step, whether gradient accumulation is exact for a model.

It is not exact if samples of a micro-batch influence each other, or if the loss is not a sum over
targets divided by the given number of targets. Then accumulated micro-batches have another gradient
than the whole batch, in fitune as in any other trainer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fitune.distributed.sharding import Shards
from fitune.recorder.record import is_compiled
from fitune.step.random_state import seed_streams, streams_kept

#: How many evenly spaced elements of each parameter's gradient are compared; storing two whole
#: gradients would take too much memory.
SAMPLED = 4096
#: relative to the gradient's norm
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
#: for 16-bit types and autocast
COARSE_TOLERANCE = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class ProbeSamples(Generic[T]):
    """Two samples with very different numbers of targets, together and alone."""

    both: T
    first: T
    second: T
    #: a sample without any target, if it is to be checked
    masked: T | None
    #: of both samples together
    loss_weight: float


@dataclass(frozen=True)
class Verdict:
    """The result of the check."""

    #: whether every split of a batch has the whole batch's gradient
    exact: bool
    #: a clause for the user, empty if there is nothing to say
    reason: str = ""


def check_model(
    model: nn.Module,
    loss_share: Callable[[T, float], Tensor],
    probe: ProbeSamples[T],
    *,
    mean_by: Literal["loss function", "forward"] = "loss function",
    shards: Shards | None = None,
) -> Verdict:
    """Compare the gradient of two samples together with the sum of their gradients alone.

    loss_share: returns the sum of a part's target losses divided by N, with its autograd graph.
    mean_by: what the message names as the cause if the loss turns out to be a mean.
    shards: if the model is sharded, its processes check it together, each with both samples.

    Parameters, `.grad` (None), buffers, training mode and random generators are restored.
    """
    device = next(model.parameters()).device
    with streams_kept(device), _buffers_restored(model) as changed_modules:
        compute = _Probe(model, loss_share, device, shards)
        loss, gradient = compute(probe.both, probe.loss_weight)
        if not math.isfinite(loss):
            return Verdict(False, f"the loss of two ordinary samples is {loss}")
        again, _ = compute(probe.both, probe.loss_weight)
        if again != loss:
            return Verdict(
                False,
                f"two identical calls gave losses {loss:.6g} and {again:.6g}: the model keeps a state",
            )
        if reason := _not_a_sum(compute, probe, loss, model, mean_by):
            return Verdict(False, reason)
        if probe.masked is not None:
            masked, _ = compute(probe.masked, probe.loss_weight)
            if not math.isfinite(masked) or abs(masked) > compute.tolerance:
                return Verdict(
                    False, f"a sample without targets has the loss {masked:.4g} instead of 0"
                )
        changed = ", ".join(changed_modules())
        error = _additive_error(compute, probe, gradient)
        if error <= compute.tolerance:
            note = (
                f"{changed} change buffers in every forward, also when samples are only split"
                if changed
                else ""
            )
            return Verdict(True, note)
        if changed:
            return Verdict(
                False,
                f"samples of a micro-batch are mixed by {changed}: the gradient is {error:.0%} off",
            )
        was_training = model.training
        model.eval()
        try:
            _, gradient = compute(probe.both, probe.loss_weight)
            only_in_training = _additive_error(compute, probe, gradient) <= compute.tolerance
        finally:
            model.train(was_training)
        if only_in_training:
            return Verdict(True, "dropout draws other masks for another split")
        return Verdict(
            False, f"samples of a micro-batch depend on each other: the gradient is {error:.0%} off"
        )


class _Probe(Generic[T]):
    """Computes a forward and a backward, and returns the loss and a sample of the gradient."""

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
        with ExitStack() as stack:
            # hooks of all modules run twice where a module is compiled, and torch warns of it
            if not is_compiled(self._model):
                hook = register_module_forward_pre_hook(self._notice_autocast)
                stack.callback(hook.remove)
            loss = self._loss_share(part, loss_weight)
        if loss.dtype != torch.float32:
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

    def _notice_autocast(self, module: nn.Module, args: object) -> None:
        """Allow for the rounding of 16-bit products, which is seen inside of the forward alone."""
        if torch.is_autocast_enabled(self._device.type):
            self.tolerance = max(self.tolerance, COARSE_TOLERANCE)


def _not_a_sum(
    compute: _Probe[T],
    probe: ProbeSamples[T],
    loss: float,
    model: nn.Module,
    mean_by: Literal["loss function", "forward"],
) -> str | None:
    """Return why the loss is not a sum of target losses divided by N, or None if it is.

    If N is doubled, a sum is halved and a mean stays the same. Anything that is added to a sum
    remains as the difference.
    """
    doubled, _ = compute(probe.both, 2 * probe.loss_weight)
    added = 2 * doubled - loss
    small = max(compute.tolerance, 1e-6) * abs(loss)
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


def _additive_error(compute: _Probe[T], probe: ProbeSamples[T], gradient: Tensor) -> float:
    """Return |g(a and b) - g(a) - g(b)| / |g(a and b)| of the two samples' gradients."""
    _, first = compute(probe.first, probe.loss_weight)
    _, second = compute(probe.second, probe.loss_weight)
    return float((gradient - first - second).norm() / gradient.norm().clamp_min(1e-30))


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Restore the buffers afterwards.

    Yields a function that returns the class names of the modules whose buffers changed so far.
    """
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
