"""A model whose parameters, gradients and optimizer state are dealt over several processes (FSDP2, `fully_shard`).

Each layer is gathered before it is computed, forward and backward, and its gradient is summed and dealt again behind
it. So the processes meet within every layer, and none may wait there for one that has failed. Therefore

announced   before each of these meetings all say on the CPU that they have come this far, and for what. Where one has
            run out of memory instead, it says so there, and all leave the pass together (`AbortedError`)
in step     a pass, forward and backward, is begun by all or by none: who has no rows left computes `idle`, which has no
            target and so a gradient of zeros
taken back  forward and backward change no parameter. What they left is dropped, and the step is done again
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, distributed, nn

from fitune.data.packing import lay_out
from fitune.data.rows import Row
from fitune.errors import ConfigError, ModelError
from fitune.machine.out_of_memory import memory_failure
from fitune.model.recompute import recomputable_layers

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")
HERE, MORE, FAILED = 0, 1, 2
"""What a process says at a meeting: that it is there; that it has rows left; that it will not come any more."""

CLIP_EPS = 1e-6
"""That of torch's own clipping."""


class AbortedError(Exception):
    """Another process has left the pass: why, it tells next."""


class ShardPeers(Protocol):
    """The processes that hold the shards, this one among them."""

    @property
    def rank(self) -> int: ...

    def exchange(self, value: T) -> list[T]:
        """What each process gave, in their order. Raises FituneError where one of them stops instead."""
        ...

    def vote(self, word: int, *, about: int) -> int:
        """The largest word of all. Raises FituneError where they are not about the same, unless one has FAILED."""
        ...

    def lost(self, error: BaseException) -> Exception:
        """The error of a process whose connections are closed."""
        ...

    @property
    def is_broken(self) -> bool: ...

    def group(self, device: torch.device) -> Any:
        """The group that tensors on this device go through."""
        ...


class Shards:
    """The processes' agreement on one sharded model, made by `shard_model`."""

    def __init__(self, model: nn.Module, peers: ShardPeers, group: Any, *, packed: bool) -> None:
        self.peers = peers
        self.idle = lay_out([Row(0, np.array([1, 2], np.int32), np.zeros(2, np.float32))], packed=packed)
        self._model, self._group = cast("FSDPModule", model), group
        self._on_gradient: Callable[[Tensor], None] | None = None

    def run(self, function: Callable[[], T]) -> T:
        """What the function computes with the model's parts, as the model's own forward: what does not belong to a
        layer (embedding, last norm, head) is gathered from before it to the end of the backward."""
        return cast(T, self._model.run_whole(function))  # type: ignore[attr-defined]

    def more(self, has_rows: bool) -> bool:
        """Whether another pass begins, since a process has rows left. Raises AbortedError."""
        return self._meet(MORE if has_rows else HERE, "pass") == MORE

    def ready(self) -> None:
        """Every process has come here. Raises AbortedError."""
        self._meet(HERE, "ready")

    def leave(self) -> None:
        """This process has failed and comes to no meeting before the others know why."""
        if not self.peers.is_broken:
            self.peers.vote(FAILED, about=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Of what is not done again: where it fails in one process it fails in all, with that one's error."""
        try:
            with self.announced():
                yield
        except AbortedError:
            self.peers.exchange(None)  # raises what the other one tells
            raise

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Its failure is known to all before they leave it: raises AbortedError in the others."""
        try:
            yield
        except AbortedError:
            raise
        except Exception:
            self.leave()
            raise
        self.ready()

    def add_up(self, tensor: Tensor) -> None:
        """It becomes the sum of all processes' tensors."""
        self.collective("sum", tensor, lambda: distributed.all_reduce(tensor, group=self._group))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """As torch's `clip_grad_norm_`: the norm of the whole gradient before it was cut to `most`."""
        shards = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        square = nn.utils.get_total_norm(shards).float().square()
        self.add_up(square)
        norm = square.sqrt()
        torch._foreach_mul_(shards, (most / (norm + CLIP_EPS)).clamp(max=1.0))
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or what all shards of it make."""
        if not hasattr(tensor, "full_tensor"):
            return tensor
        return cast(Tensor, self.collective("whole", tensor, tensor.full_tensor))

    def collective(self, kind: str, tensor: Tensor, action: Callable[[], object]) -> Any:
        """A meeting on the device, announced. Raises AbortedError, and RestartError where a process is gone."""
        self._meet(HERE, f"{kind} {tensor.numel()}")
        try:
            return action()
        except RuntimeError as error:
            if memory_failure(error) is not None:
                raise
            raise self.peers.lost(error) from error

    def take_back(self) -> None:
        """What an aborted pass left: gathered parameters, gradients, and where FSDP thinks it stands."""
        self._drop_gradients()  # of the parameters that are gathered now
        self._model.reset_iter_state()
        self._drop_gradients()

    def rest(self) -> None:
        """After forwards without a backward: nothing stays gathered."""
        self._model.reshard()

    @contextmanager
    def reading(self, on_gradient: Callable[[Tensor], None]) -> Iterator[None]:
        """Within it the function sees this process's own gradients, layer by layer and flat, before they are summed."""
        self._on_gradient = on_gradient
        try:
            yield
        finally:
            self._on_gradient = None

    def read(self, gradient: Tensor) -> None:
        if self._on_gradient is not None:
            self._on_gradient(gradient)

    def _meet(self, word: int, what: str) -> int:
        largest = self.peers.vote(word, about=crc32(what.encode()))
        if largest == FAILED:
            raise AbortedError(what)
        return largest

    def _drop_gradients(self) -> None:
        for parameter in cast(nn.Module, self._model).parameters():
            parameter.grad = None


def shard_model(model: nn.Module, peers: ShardPeers, *, device: torch.device, packed: bool) -> Shards:
    """Deal the parameters, layer by layer, and put the shards on `device`. The model may be in the host's memory until
    then. Gradients are summed in float32 and never divided. Raises ModelError for a model that this does not fit."""
    from torch.distributed.device_mesh import DeviceMesh  # not in every build of torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    from fitune.distributed.announced import AnnouncedGather, AnnouncedReduction

    layers = dealt_layers(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(f"model.shard=full needs trained parameters of one type and this model has {listed}")
    group = peers.group(device)
    mesh = DeviceMesh.from_group(group, device.type)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # what is computed in which format, autocast decides
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    shards = Shards(model, peers, group, packed=packed)
    gather, reduction = AnnouncedGather(shards.collective), AnnouncedReduction(shards.collective, shards.read)
    for part in (*layers, model):
        assert isinstance(part, FSDPModule)
        part.set_custom_all_gather(gather)
        part.set_custom_reduce_scatter(reduction)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reduce_scatter_unused_params(True, recurse=False)  # an expert that saw no token here
    model.run_whole = lambda function: function()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_whole")
    return shards


def dealt_layers(model: nn.Module) -> list[nn.Module]:
    """Which are gathered one by one. Raises ModelError where there are none."""
    layers: list[nn.Module] = list(recomputable_layers(model))
    if not layers:
        raise ModelError(
            "model.shard=full needs layers that transformers marks as such, which this model lacks: drop it"
        )
    return layers


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def check_torch() -> None:
    """Raises ConfigError where this torch cannot take an aborted pass back."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError as error:
        raise ConfigError(["model.shard=full needs a torch that is built with torch.distributed: drop it"]) from error
    if not hasattr(FSDPModule, "reset_iter_state") or not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            [f"model.shard=full needs a newer torch than {torch.__version__}: pip install -U torch, or drop it"]
        )
