"""The parts of an optimizer step that work on gradients: backward, sum, clipping and update."""

import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fitune.batch_size.norms import GradientNorms, NormRecorder
from fitune.errors import RestartError
from fitune.machine.out_of_memory import memory_failure


class ClippingPeers(Protocol):
    """The processes that share or shard a gradient; see `progress.Peers`."""

    def ready(self) -> None:
        """Wait until every process has reached this point."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Clip `.grad` in place and return the norm of the whole gradient before that."""
        ...


def backward(
    loss: Tensor,
    scaler: torch.amp.GradScaler | None,
    norms: NormRecorder | None = None,
    *,
    alone: bool = False,
) -> Tensor:
    """Compute the gradients, and return the loss without its graph.

    loss: a scalar, or a vector whose first element is the loss; see `Objective.loss_sum`.
    alone: the micro-batch is the whole step; see `NormRecorder.reading`.
    """
    with nullcontext() if norms is None else norms.reading(alone=alone):
        scalar = loss_of(loss)
        torch.autograd.backward(scalar if scaler is None else scaler.scale(scalar))
    return loss.detach()


def loss_of(share: Tensor) -> Tensor:
    """Return the loss alone of what `Objective.loss_sum` returns, which has the graph."""
    return share if share.dim() == 0 else share[0]


class CommitBuffer:
    """Sums of the gradients of finished micro-batches, in float32.

    `.grad` is None before each micro-batch and is added to the sums after it, so a backward that
    fails midway spoils only `.grad`. The sums take a gradient's memory, which is little if few
    parameters are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def add(self) -> None:
        """Add `.grad` to the sums; after a failure, nothing of it has been added.

        What must be allocated is allocated first.
        """
        pairs = list(zip(self._sums, self._parameters, strict=True))
        new = [
            p.grad.float() if total is None and p.grad is not None else None for total, p in pairs
        ]
        old = [(total, p.grad) for total, p in pairs if total is not None and p.grad is not None]
        if old:
            torch._foreach_add_([total for total, _ in old], [gradient for _, gradient in old])
        self._sums = [
            total if first is None else first for (total, _), first in zip(pairs, new, strict=True)
        ]
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def num_bytes(self) -> int:
        return sum(total.nbytes for total in self._sums if total is not None)

    def filled(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """Fill missing sums with zeros; return all sums, and the places of the missing ones."""
        missing = tuple(place for place, total in enumerate(self._sums) if total is None)
        zeros = [
            torch.zeros_like(self._parameters[place], dtype=torch.float32) for place in missing
        ]
        for place, zero in zip(missing, zeros, strict=True):
            self._sums[place] = zero
        return [total for total in self._sums if total is not None], missing

    def drop(self, places: Collection[int]) -> None:
        for place in places:
            self._sums[place] = None

    def hand_over(self) -> None:
        """Move the sums to `.grad`, in the parameters' dtype, which empties this buffer."""
        for place, parameter in enumerate(self._parameters):
            total, self._sums[place] = self._sums[place], None
            parameter.grad = None if total is None else total.to(parameter.dtype)


def missing_gradients_as_zeros(model: nn.Module) -> tuple[list[Tensor], tuple[int, ...]]:
    """Give trained parameters without a gradient one of zeros.

    Returns all gradients, and the places of the zeros.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    missing = tuple(place for place, parameter in enumerate(trained) if parameter.grad is None)
    for place, zeros in zip(
        missing, [torch.zeros_like(trained[place]) for place in missing], strict=True
    ):
        trained[place].grad = zeros
    return [parameter.grad for parameter in trained if parameter.grad is not None], missing


class Clipped(NamedTuple):
    """What is known about a step's gradient after clipping."""

    #: mean loss of the step
    loss: float
    #: before clipping
    grad_norm: float
    norms: GradientNorms | None
    #: of the step, those of `Objective.means`
    means: tuple[float, ...] = ()


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    losses: Sequence[Tensor],
    *,
    max_norm: float,
    scaler: torch.amp.GradScaler | None,
    norms: NormRecorder | None,
    peers: ClippingPeers,
) -> Clipped:
    """Clip `.grad` in place, and return loss and norms, with one transfer to the host.

    losses: each piece's share of the mean loss, and of what follows it in a vector.
    norms: has recorded the micro-batches' norms, if they are wanted.
    """
    if scaler is not None:
        # unscale_ notifies all processes of a sharded model of an overflow in one shard
        peers.ready()
        scaler.unscale_(optimizer)
    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    on_device = [] if norms is None else [norms.values()]
    norm = peers.clip(parameters, max_norm)
    host = torch.cat((_totals(losses, norm), *on_device)).tolist()
    num_shares = losses[0].numel()
    (loss, *means), grad_norm = host[:num_shares], host[num_shares]
    scale = 1.0 if scaler is None else scaler.get_scale()
    read = None
    if norms is not None:
        read = norms.read(host[num_shares + 1 :], total_norm=grad_norm, scale=scale)
    return Clipped(loss, grad_norm, read, tuple(means))


def _totals(losses: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Return the sums of the pieces' shares, and the norm behind them."""
    return torch.cat((torch.stack(list(losses)).sum(0).view(-1), norm.float().view(1)))


def update(
    optimizer: torch.optim.Optimizer,
    grad_norm: float,
    *,
    scaler: torch.amp.GradScaler | None,
    protected: bool,
) -> bool:
    """Update the parameters unless the gradient is not finite; return whether they were updated.

    `.grad` is None afterwards.

    protected: copy parameters and optimizer state first, and restore them if the update fails
        midway. Without a copy, running out of memory midway raises RestartError.
    """
    updated = math.isfinite(grad_norm)
    if scaler is not None or updated:
        before = _Rollback(optimizer) if protected else None
        try:
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        except Exception as error:
            if before is not None:
                before.put_back()
            elif memory_failure(error) is not None:
                raise RestartError(
                    "out of memory in the middle of the optimizer's update, which cannot be undone: start again from "
                    "the last checkpoint; optim.name=adamw needs no memory there"
                ) from error
            raise
    optimizer.zero_grad(set_to_none=True)
    return updated


class _Rollback:
    """A copy of what an optimizer's update changes. Restoring it allocates nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._values = [(parameter, torch.empty_like(parameter)) for parameter in trained]
        self._state = {
            parameter: {
                key: torch.empty_like(value) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }
        _copy_all([(copy, parameter) for parameter, copy in self._values])
        _copy_all(
            [
                (copy, optimizer.state[parameter][key])
                for parameter, state in self._state.items()
                for key, copy in state.items()
                if isinstance(copy, Tensor)
            ]
        )

    def put_back(self) -> None:
        _copy_all(self._values)
        for parameter in list(self._optimizer.state):
            if parameter not in self._state:
                del self._optimizer.state[parameter]
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = state


@torch.no_grad()
def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, with a few launches per device."""
    for device in {source.device for _, source in pairs}:
        of_device = [(into, source) for into, source in pairs if source.device == device]
        torch._foreach_copy_([into for into, _ in of_device], [source for _, source in of_device])
