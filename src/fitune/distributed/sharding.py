"""Shard a model over several processes with FSDP2, so that no failure leaves a process waiting.

Each process holds a part of every parameter, gradient and optimizer state (`fully_shard`). A
layer's parameters are gathered before the layer runs, in forward and in backward, and its gradient
is reduce-scattered after its backward. So the processes meet in collectives inside of every layer,
and a process that has run out of memory would leave the others waiting there. Three rules prevent
that:

1. Before each collective all processes vote, on the CPU, that they have reached it. A process that
   failed votes that it failed, and then all of them leave the forward and backward pass
   (`AbortedError`).
2. Either all processes begin a pass (a forward and its backward) or none does. A process that has
   no samples left computes `idle`, a sample without targets, whose gradient is zero.
3. Forward and backward change no parameter. After an aborted pass its gradients are dropped, and
   the step is computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor, distributed, nn

from fitune.data.rows import MicroBatch
from fitune.errors import ConfigError, ModelError
from fitune.machine.out_of_memory import memory_failure
from fitune.model.recompute import recomputable_layers

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")
#: A process's vote: it has reached this collective; it has samples left; it failed and takes part
#: in no further collective
HERE, MORE, FAILED = 0, 1, 2

#: The epsilon of `torch.nn.utils.clip_grad_norm_`
CLIP_EPS = 1e-6


class AbortedError(Exception):
    """Raised where another process has left the pass; that process reports its error next."""


class ShardPeers(Protocol):
    """The processes that hold the shards, this one included."""

    @property
    def rank(self) -> int: ...

    def exchange(self, value: T) -> list[T]:
        """Return the value of each process, by rank. Raises FituneError where one stops instead."""
        ...

    def vote(self, vote: int, *, about: int) -> int:
        """Return the largest vote of all processes.

        Raises FituneError where they name a different `about`, unless one has voted FAILED.
        """
        ...

    def lost(self, error: BaseException) -> Exception:
        """Return the error to raise after a process closed its connections."""
        ...

    @property
    def is_broken(self) -> bool: ...

    def group(self, device: torch.device) -> Any:
        """Return the process group for tensors on this device."""
        ...


class Shards:
    """A sharded model and what its processes do together; made by `shard_model`."""

    def __init__(
        self, model: nn.Module, peers: ShardPeers, group: object, *, idle: MicroBatch
    ) -> None:
        self.peers, self.idle = peers, idle
        self._model, self._group = cast("FSDPModule", model), group
        self._on_gradient: Callable[[Tensor], None] | None = None

    def run(self, function: Callable[[], T]) -> T:
        """Return function(), called as if it were the forward of the whole model.

        Parameters outside of the layers (embedding, final norm, head) are gathered before the call
        and stay gathered until the backward ends.
        """
        return cast(T, self._model.run_whole(function))  # type: ignore[attr-defined]

    def more(self, has_rows: bool) -> bool:
        """Return whether another pass begins, as any process has samples left.

        Raises AbortedError.
        """
        return self._agree(MORE if has_rows else HERE, "pass") == MORE

    def ready(self) -> None:
        """Wait until every process gets here. Raises AbortedError."""
        self._agree(HERE, "ready")

    def leave(self) -> None:
        """Make the others raise AbortedError at their next vote, since this process has failed."""
        if not self.peers.is_broken:
            self.peers.vote(FAILED, about=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make a failure of this block in one process raise that process's error in all of them.

        This is for work that is not repeated after a failure.
        """
        try:
            with self.announced():
                yield
        except AbortedError:
            self.peers.exchange(None)  # raises the error that the failed process reports
            raise

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Make a failure of this block in one process raise AbortedError in the others.

        No process leaves the block before all have finished it.
        """
        try:
            yield
        except AbortedError:
            raise
        except Exception:
            self.leave()
            raise
        self.ready()

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum of all processes' tensors."""
        self.collective("sum", tensor, lambda: distributed.all_reduce(tensor, group=self._group))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Clip the gradients of sharded parameters as torch's `clip_grad_norm_` does.

        Returns the norm of the whole gradient before it was clipped to `most`.
        """
        shards = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        square = nn.utils.get_total_norm(shards).float().square()
        self.add_up(square)
        norm = square.sqrt()
        torch._foreach_mul_(shards, (most / (norm + CLIP_EPS)).clamp(max=1.0))
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the unsharded tensor, gathered from all processes if it is sharded."""
        if not hasattr(tensor, "full_tensor"):
            return tensor
        return cast(Tensor, self.collective("whole", tensor, tensor.full_tensor))

    def collective(self, kind: str, tensor: Tensor, action: Callable[[], object]) -> object:
        """Run a collective after all processes have agreed to.

        Raises AbortedError where another process failed, and RestartError where one is gone.
        """
        self._agree(HERE, f"{kind} {tensor.numel()}")
        try:
            return action()
        except RuntimeError as error:
            if memory_failure(error) is not None:
                raise
            raise self.peers.lost(error) from error

    def take_back(self) -> None:
        """Drop what an aborted pass left.

        That is the gathered parameters, the gradients and FSDP's record of its progress.
        """
        # Before the reset the model's parameters are the gathered ones, after it the shards; both
        # can have gradients.
        self._drop_gradients()
        self._model.reset_iter_state()
        self._drop_gradients()

    def rest(self) -> None:
        """Free the gathered parameters after forwards that had no backward."""
        self._model.reshard()

    @contextmanager
    def reading(self, on_gradient: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `on_gradient` with each layer's flat local gradient, before the processes sum it."""
        self._on_gradient = on_gradient
        try:
            yield
        finally:
            self._on_gradient = None

    def read(self, gradient: Tensor) -> None:
        if self._on_gradient is not None:
            self._on_gradient(gradient)

    def _agree(self, vote: int, what: str) -> int:
        largest = self.peers.vote(vote, about=crc32(what.encode()))
        if largest == FAILED:
            raise AbortedError(what)
        return largest

    def _drop_gradients(self) -> None:
        for parameter in cast(nn.Module, self._model).parameters():
            parameter.grad = None


def shard_model(
    model: nn.Module, peers: ShardPeers, *, device: torch.device, idle: MicroBatch
) -> Shards:
    """Shard the parameters layer by layer, and put the shards on `device`.

    idle: a sample without targets, for a process that has no samples left.

    The model may be in host memory until then. Gradients are summed in float32 and never divided by
    the number of processes. Raises ModelError for a model that cannot be sharded.
    """
    from torch.distributed.device_mesh import DeviceMesh  # not in every build of torch
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    from fitune.distributed.announced import AnnouncedGather, AnnouncedReduction

    layers = gathered_layers(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(
            f"model.shard=full needs trained parameters of one type and this model has {listed}"
        )
    group = peers.group(device)
    mesh = DeviceMesh.from_group(group, device.type)
    # Autocast, not FSDP, decides which operation computes in which dtype.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    shards = Shards(model, peers, group, idle=idle)
    gather, reduction = (
        AnnouncedGather(shards.collective),
        AnnouncedReduction(shards.collective, shards.read),
    )
    for part in (*layers, model):
        assert isinstance(part, FSDPModule)
        part.set_custom_all_gather(gather)
        part.set_custom_reduce_scatter(reduction)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        # An expert may get tokens in one process and none in another, which then has no gradient.
        part.set_reduce_scatter_unused_params(True, recurse=False)
    model.run_whole = lambda function: function()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_whole")
    return shards


def gathered_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are gathered one at a time. Raises ModelError where there are none."""
    layers: list[nn.Module] = list(recomputable_layers(model))
    if not layers:
        raise ModelError(
            "model.shard=full needs layers that transformers marks as such, which this model lacks: drop it"
        )
    return layers


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or any other tensor itself."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def check_torch() -> None:
    """Raise ConfigError if this torch cannot reset FSDP after an aborted pass."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError as error:
        raise ConfigError(
            ["model.shard=full needs a torch that is built with torch.distributed: drop it"]
        ) from error
    if not hasattr(FSDPModule, "reset_iter_state") or not hasattr(
        FSDPModule, "set_reduce_scatter_unused_params"
    ):
        raise ConfigError(
            [
                f"model.shard=full needs a newer torch than {torch.__version__}: pip install -U torch, or drop it"
            ]
        )
