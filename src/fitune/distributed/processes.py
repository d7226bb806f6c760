"""The processes that train one model together, started by torchrun: which one this is, and how they agree.

Each has the whole model and the optimizer's state, and a device of its own. They do the same steps and differ only in
the rows that they compute (data/deal.py). Decisions go through a group on the CPU, gradients through one on the
devices.

A process that stops says why in place of what it was to give next, so that all stop with its sentence. One that dies
says nothing: the others find its connections closed. Without torchrun there is one process, `Ranks()`, which exchanges
with itself; nothing of torch.distributed is then touched.
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

#: of the float32 buffer in which the gradients of all cards are summed piece by piece
BUCKET_BYTES = 32 * MIB
MOST_WAIT = timedelta(hours=2)
"""For what another process does meanwhile, such as tokenising; one that died is noticed at once."""
SAMPLED_ELEMENTS = 4096
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The group of processes. rank: of this one, from 0; the first leads and alone writes. size: how many there are."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        self._bucket: Tensor | None = None
        self._heard: BaseException | None = None
        self.is_broken = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """What each process gave, by rank. All processes call this in the same order.

        Raises the error that another one stops with, or RestartError where one is gone.
        """
        if self.size == 1:
            return [value]
        entries = self._gather((value, None))
        for rank, (_, fault) in enumerate(entries):
            if fault is not None:
                kind, exit_code, sentence = fault
                error = kind(f"rank {rank}: {sentence}")
                error.exit_code = exit_code
                self._heard = error
                raise error
        return [given for given, _ in entries]

    def tell(self, error: BaseException) -> bool:
        """Give this error in place of what is exchanged next, so that the others raise it too. Whether they know of it;
        an error that one of them told is known already."""
        if self.size == 1 or self.is_broken:
            return False
        if not self._is_known(error):
            try:
                self._gather((None, _fault(error)))
            except RestartError:
                return False
            self._heard = error
        return True

    def group(self, device: "torch.device") -> Any:
        """The group that tensors on this device go through; the same at every call."""
        from torch import distributed

        if self._group is None:
            self._group = distributed.new_group(backend="nccl") if device.type == "cuda" else distributed.group.WORLD
        return self._group

    def connect(self, device: "torch.device") -> None:
        """Make what `sum` needs, before anything else takes its memory."""
        if self.size == 1:
            return
        import torch

        self.group(device)
        self._bucket = torch.empty(BUCKET_BYTES // 4, dtype=torch.float32, device=device)
        self.sum([torch.zeros(1, device=device)])  # NCCL connects at its first call

    def vote(self, word: int, *, about: int) -> int:
        """The largest word that a process gave. about: what they vote on, which must be the same unless one has said
        a word of 2 or more, and is where it is not expected."""
        import torch
        from torch import distributed

        ballot = torch.tensor([word, about, -about])
        try:
            distributed.all_reduce(ballot, distributed.ReduceOp.MAX)
        except RuntimeError as error:
            raise self.lost(error) from error
        largest, most, least = ballot.tolist()
        if largest < 2 and most != -least:
            self.is_broken = True
            raise RestartError(
                f"rank {self.rank}: the {self.size} processes no longer compute the same layers: start all of them "
                "again with fitune train --resume"
            )
        return int(largest)

    def sum(self, tensors: "Sequence[Tensor]") -> None:
        """Each tensor becomes the sum over all processes, formed in float32. Takes no memory."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        assert self._bucket is not None, "connect() first"
        try:
            with torch.no_grad():
                for pieces in _fills(tensors, self._bucket.numel()):
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
        """Raises FituneError where the processes hold other values: a few thousand elements of each are compared."""
        if self.size == 1:
            return
        digest = blake2b(digest_size=8)
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: -(-flat.numel() // SAMPLED_ELEMENTS)]
            digest.update(sample.float().cpu().numpy().tobytes())
        if len(set(self.exchange(digest.hexdigest()))) > 1:
            raise FituneError(
                "the processes no longer have the same weights: give all of them the same device, versions and number "
                "of threads, and go on from the last checkpoint with --resume"
            )

    def _gather(self, entry: Any) -> list[Any]:
        from torch import distributed

        entries: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(entries, entry)
        except RuntimeError as error:
            raise self.lost(error) from error
        return entries

    def lost(self, error: BaseException) -> RestartError:
        """From now on nothing can be said to the others."""
        self.is_broken = True
        lost = RestartError(
            f"rank {self.rank}: another of the {self.size} processes is gone ({' '.join(str(error).split())[:120]}): "
            "start all of them again with fitune train --resume"
        )
        self._heard = lost
        return lost

    def _is_known(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._heard:
                return True
            error = error.__cause__
        return False


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, connected until this ends; one alone without it.

    An error goes to all of them, and rank 0 says it for all. Raises UsageError where torchrun's variables are not whole
    or this machine has too few cards.
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
        if ranks.tell(error) and not ranks.leads and isinstance(error, FituneError):
            silent = FituneError("")
            silent.exit_code = error.exit_code
            raise silent from error
        raise
    else:
        distributed.destroy_process_group()  # after an error the end of the process closes the connections, unasked


def _number(name: str, default: int) -> int:
    """A variable of torchrun; one that is set to nothing is as one that is not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{name} is {text[:40]!r} and not a whole number: start with torchrun, or unset {name}")
    return int(text)


def _join(size: int) -> Ranks:
    import torch
    from torch import distributed

    if missing := [name for name in VARIABLES if not os.environ.get(name, "").strip()]:
        raise UsageError(f"WORLD_SIZE is {size} and {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE")
    rank = _number("RANK", 0)
    if torch.cuda.is_available():
        local, num_cards = _number("LOCAL_RANK", rank), torch.cuda.device_count()
        if local >= num_cards:
            raise UsageError(
                f"{local + 1} processes are started here and {num_cards} cards are visible: give torchrun "
                f"--nproc_per_node {num_cards}"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=MOST_WAIT)
    return Ranks(rank, size)


def _fault(error: BaseException) -> tuple[type[FituneError], int, str]:
    if not isinstance(error, FituneError):
        return FituneError, FituneError.exit_code, f"{type(error).__name__}: {error}"
    kind = UsageError if isinstance(error, ConfigError) else type(error)  # which takes its sentences one by one
    return kind, error.exit_code, str(error)


def _fills(tensors: "Sequence[Tensor]", room: int) -> "Iterator[list[Tensor]]":
    """The elements of all tensors, as flat views in lists of at most `room` elements."""
    pieces: list[Tensor] = []
    left = room
    for tensor in tensors:
        # in the order of the memory, which is that of the parameter, so the same in all processes
        flat = tensor.as_strided((tensor.numel(),), (1,))
        while flat.numel():
            piece, flat = flat[:left], flat[left:]
            pieces.append(piece)
            left -= piece.numel()
            if left == 0:
                yield pieces
                pieces, left = [], room
    if pieces:
        yield pieces
