"""Start, identify and coordinate the data-parallel processes of one training run (torchrun).

Each process has the whole model and optimizer state, and its own device. All do the same steps and
differ only in the samples that they compute. Decisions are exchanged through a process group on the
CPU, gradients through one on the devices.
A process that stops with an error sends that error in place of its next value, so that all
processes stop with the same message. A process that dies sends nothing: the others notice that its
connections are closed. Without torchrun there is a single process, `Ranks()`, which exchanges with
itself and never touches torch.distributed.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from fitune.errors import ConfigError, FituneError, RestartError, UsageError
from fitune.units import MIB

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

#: Size of the float32 buffer through which the gradients of all processes are summed
BUCKET_BYTES = 32 * MIB
#: How long to wait for a process that is busy, such as tokenising; one that died is noticed at once
MOST_WAIT = timedelta(hours=2)
#: How many elements of each tensor `Ranks.check_same` compares, at most
SAMPLED_ELEMENTS = 4096
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The group of processes, seen from one of them.

    rank: of this process, from 0; rank 0 leads and is the only one that writes files.
    size: the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._group: object = None
        self._bucket: Tensor | None = None
        self._known_error: BaseException | None = None
        self.is_broken = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """Return the value of each process, by rank. All processes call this in the same order.

        Raises the error that another process stops with, or RestartError where one is gone.
        """
        if self.size == 1:
            return [value]
        entries = self._gather((value, None))
        for rank, (_, fault) in enumerate(entries):
            if fault is not None:
                kind, exit_code, message = fault
                error = kind(f"rank {rank}: {message}")
                error.exit_code = exit_code
                self._known_error = error
                raise error
        return [given for given, _ in entries]

    def send_error(self, error: BaseException) -> bool:
        """Send this error in place of the next exchanged value, so that the others raise it too.

        Returns whether the others know of the error. An error that came from one of them is not
        sent.
        """
        if self.size == 1 or self.is_broken:
            return False
        if not self._is_known(error):
            try:
                self._gather((None, _sendable(error)))
            except RestartError:
                return False
            self._known_error = error
        return True

    def group(self, device: "torch.device") -> Any:
        """Return the process group for tensors on this device; the same at every call."""
        from torch import distributed

        if self._group is None:
            self._group = (
                distributed.new_group(backend="nccl")
                if device.type == "cuda"
                else distributed.group.WORLD
            )
        return self._group

    def connect(self, device: "torch.device") -> None:
        """Allocate the buffer that `sum` needs and open NCCL's connections.

        This is called before the model and optimizer take the device's memory.
        """
        if self.size == 1:
            return
        import torch

        self.group(device)
        self._bucket = torch.empty(BUCKET_BYTES // 4, dtype=torch.float32, device=device)
        self.sum([torch.zeros(1, device=device)])  # NCCL connects at its first call

    def vote(self, vote: int, *, about: int) -> int:
        """Return the largest vote of all processes.

        about: what they vote on. It must be the same in all processes, unless one has voted 2 or
            more: such a process has failed and may be anywhere in its step.
        """
        import torch
        from torch import distributed

        ballot = torch.tensor([vote, about, -about])
        try:
            distributed.all_reduce(ballot, distributed.ReduceOp.MAX)
        except RuntimeError as error:
            raise self.lost(error) from error
        largest, most, least = ballot.tolist()
        if largest < 2 and most != -least:
            self.is_broken = True
            raise RestartError(
                f"rank {self.rank}: the {self.size} processes no longer compute the same layers: "
                "start all of them again with fitune train --resume"
            )
        return int(largest)

    def sum(self, tensors: "Sequence[Tensor]") -> None:
        """Replace each tensor by its sum over all processes, computed in float32.

        The only memory used is the buffer that `connect` has allocated.
        """
        if self.size == 1:
            return
        import torch
        from torch import distributed

        assert self._bucket is not None, "connect() first"
        try:
            with torch.no_grad():
                for pieces in _in_buckets(tensors, self._bucket.numel()):
                    ends = [0]
                    for piece in pieces:
                        ends.append(ends[-1] + piece.numel())
                    views = [self._bucket[start:end] for start, end in pairwise(ends)]
                    torch._foreach_copy_(views, pieces)
                    distributed.all_reduce(self._bucket[: ends[-1]], group=self._group)
                    torch._foreach_copy_(pieces, views)
        except RuntimeError as error:
            raise self.lost(error) from error

    def check_same(self, tensors: "Iterable[Tensor]") -> None:
        """Raise FituneError if the processes hold different values.

        Compares at most `SAMPLED_ELEMENTS` elements of each tensor.
        """
        if self.size == 1:
            return
        digest = blake2b(digest_size=8)
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: -(-flat.numel() // SAMPLED_ELEMENTS)]
            digest.update(sample.float().cpu().numpy().tobytes())
        if len(set(self.exchange(digest.hexdigest()))) > 1:
            raise FituneError(
                "the processes no longer have the same weights: give all of them the same device, "
                "versions and number of threads, and go on from the last checkpoint with --resume"
            )

    def _gather(self, entry: object) -> list[Any]:
        from torch import distributed

        entries: list[object] = [None] * self.size
        try:
            distributed.all_gather_object(entries, entry)
        except RuntimeError as error:
            raise self.lost(error) from error
        return entries

    def lost(self, error: BaseException) -> RestartError:
        """Return the error to raise after a process closed its connections.

        From then on this process can send nothing to the others.
        """
        self.is_broken = True
        lost = RestartError(
            f"rank {self.rank}: another of the {self.size} processes is gone "
            f"({' '.join(str(error).split())[:120]}): start all of them again with fitune train "
            "--resume"
        )
        self._known_error = lost
        return lost

    def _is_known(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._known_error:
                return True
            error = error.__cause__
        return False


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect the processes that torchrun has started until the block ends; one without torchrun.

    An error goes to all processes, and rank 0 reports it for all. Raises UsageError if torchrun's
    variables are incomplete or this machine has too few GPUs.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        yield Ranks()
        return
    from torch import distributed

    ranks = _join(size)
    try:
        yield ranks
    except Exception as error:
        if ranks.send_error(error) and not ranks.leads and isinstance(error, FituneError):
            silent = FituneError("")
            silent.exit_code = error.exit_code
            raise silent from error
        raise
    else:
        # After an error the connections are closed by the end of the process instead.
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    """Return a variable of torchrun as a number; `default` if it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(
            f"{name} is {text[:40]!r} and not a whole number: start with torchrun, or unset {name}"
        )
    return int(text)


def _join(size: int) -> Ranks:
    import torch
    from torch import distributed

    if missing := [name for name in VARIABLES if not os.environ.get(name, "").strip()]:
        raise UsageError(
            f"WORLD_SIZE is {size} and {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE"
        )
    rank = _number("RANK", 0)
    if torch.cuda.is_available():
        local, num_cards = _number("LOCAL_RANK", rank), torch.cuda.device_count()
        if local >= num_cards:
            raise UsageError(
                f"{local + 1} processes are started here and {num_cards} cards are visible: give "
                f"torchrun --nproc_per_node {num_cards}"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=MOST_WAIT)
    return Ranks(rank, size)


def _sendable(error: BaseException) -> tuple[type[FituneError], int, str]:
    """Return the error as (class, exit code, message), from which a receiver rebuilds it."""
    if not isinstance(error, FituneError):
        return FituneError, FituneError.exit_code, f"{type(error).__name__}: {error}"
    # ConfigError takes a list of messages instead of one.
    kind = UsageError if isinstance(error, ConfigError) else type(error)
    return kind, error.exit_code, str(error)


def _in_buckets(tensors: "Sequence[Tensor]", most_elements: int) -> "Iterator[list[Tensor]]":
    """Yield lists of flat views that cover all tensors, `most_elements` elements in each list."""
    pieces: list[Tensor] = []
    left = most_elements
    for tensor in tensors:
        # The memory order of a gradient follows its parameter, so it is the same in all processes.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        while flat.numel():
            piece, flat = flat[:left], flat[left:]
            pieces.append(piece)
            left -= piece.numel()
            if left == 0:
                yield pieces
                pieces, left = [], most_elements
    if pieces:
        yield pieces
