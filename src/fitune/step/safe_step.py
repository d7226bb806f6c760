"""The training step that running out of memory neither changes nor ends.

    attempt    forward, backward and commit of each piece, then clip and update: the parts of `train_step`. Between them
               the gradients of all processes are summed, where the rows are dealt over several (step/shared_step.py)
    recover    the error and its frames are gone; gradients are dropped, buffers put back, memory is given back
    ladder     the same size again, where something passing explains the failure; smaller pieces; at a single row what
               the user allows to save memory; then the row is left out, or the run stops

The rows of the step, the weight N that they are divided by and the learning rate stay what they are, so the gradient
does too. An attempt either commits whole pieces to a buffer of its own (`StepSettings.commit`) or begins again.

Of a model that is dealt over several processes (step/shards.py) every pass is one of all: what fails in one is told to
all, who go down the same rung and begin the step again.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fitune.errors import OutOfMemoryError, RestartError
from fitune.model.device import map_large_blocks, usable_bytes
from fitune.step.gradient_norms import NormRecorder
from fitune.step.out_of_memory import memory_failure, needed_bytes, release_memory
from fitune.step.random_state import micro_batch_seed, seed_streams, streams_kept
from fitune.step.shards import AbortedError, Shards
from fitune.step.shared_step import SharedStep, Told, left_weight, sum_up
from fitune.step.train_step import (
    NOTHING_TO_LEARN,
    CommitBuffer,
    StepResult,
    backward,
    clip_gradients,
    update,
)
from fitune.units import format_bytes

MOST_ATTEMPTS = 40
"""Of one step. Halving reaches a single row in 20 from a million positions; beyond that something else is wrong."""
MOST_UPDATES = 2
"""What comes after the last piece needs little, and smaller pieces would not help it."""
Place = Literal["forward", "backward", "commit", "sum", "clip", "update", "evaluation", "elsewhere"]
LATE: tuple[Place, ...] = ("sum", "clip", "update")
"""After the last piece."""


class Piece(Protocol):
    """What one forward and backward computes: a micro-batch, or a part of someone's own batch. num_positions: tokens
    with padding."""

    @property
    def row_ids(self) -> tuple[int, ...]: ...

    @property
    def loss_weight(self) -> float: ...

    @property
    def num_positions(self) -> int: ...


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, kw_only=True)
class Work(Generic[P]):
    """What a step computes, and how its pieces become smaller.

    loss_share(piece, loss_weight): what the piece adds to the mean loss of a batch of that weight, with its graph.
    split(piece, most_positions): its rows in pieces of at most so many positions, or of one row.
    without(piece, row_ids): the piece without these rows, None where no row is left.
    shards, idle_share: of a model that is dealt over several processes; the loss of a pass without rows.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loss_share: Callable[[P, float], Tensor]
    split: Callable[[P, int], list[P]]
    without: Callable[[P, Collection[int]], P | None]
    clip: float
    commit: bool
    shards: Shards | None = None
    idle_share: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Relief(Generic[P]):
    """Something that saves memory and changes no gradient. name: as the user would configure it."""

    name: str
    apply: Callable[[Work[P]], Work[P]]


@dataclass(kw_only=True)
class Protection(Generic[P]):
    """What safe steps carry from one to the next.

    reliefs: tried in this order, when a single row does not fit; relieved: the names of those tried, which stay.
    quarantine: whether a row that does not fit even then is left out, from now on, instead of ending the run. room: the
    bytes that are free. way_out: what a person can do where nothing helps, as a clause.
    """

    work: Work[P]
    seed: int = 0
    reliefs: list[Relief[P]] = field(default_factory=list)
    relieved: tuple[str, ...] = ()
    quarantine: bool = False
    quarantined: set[int] = field(default_factory=set)
    room: Callable[[], int | None] | None = None
    watched: list[tuple[nn.Module, str]] | None = None
    way_out: str = "give shorter samples or a smaller model"

    @property
    def device(self) -> torch.device:
        return next(self.work.model.parameters()).device

    def free_bytes(self) -> int | None:
        return usable_bytes(self.device) if self.room is None else self.room()

    def relieve(self, name: str) -> None:
        """From now on; of no effect where it is in force, or is none of `reliefs`."""
        for relief in [each for each in self.reliefs if each.name == name]:
            self.reliefs.remove(relief)
            self.work = relief.apply(self.work)
            self.relieved += (name,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Memory ran out once. row_ids, num_positions: of the piece. needed_bytes: of the allocation that failed.
    free_bytes: after everything was given back; with the gradients that the step keeps all the same it is what others
    left to the whole step, left_bytes. action: what was done about it, as a clause. rank: of the process, where all go
    back together."""

    place: Place
    row_ids: tuple[int, ...]
    num_positions: int
    needed_bytes: int | None
    free_bytes: int | None = None
    left_bytes: int | None = None
    action: str = ""
    rank: int = 0

    @property
    def where(self) -> str:
        if self.place in LATE:
            return self.place
        rows = f"sample {self.row_ids[0]}" if len(self.row_ids) == 1 else f"{len(self.row_ids)} samples"
        return f"{self.place} of {rows} ({self.num_positions:,} tokens with padding)"

    def __str__(self) -> str:
        needed = "" if self.needed_bytes is None else f", {format_bytes(self.needed_bytes)} at once were missing"
        process = f"rank {self.rank}: " if self.rank else ""
        return f"{process}out of memory in the {self.where}{needed}: {self.action}; no sample is lost"


ELSEWHERE = Failure(place="elsewhere", row_ids=(), num_positions=0, needed_bytes=None)
"""In another process of a sharded model, which tells it next."""


@dataclass(frozen=True, slots=True)
class SafeResult:
    """plan: the row ids of each piece that the update is made of, in order, as `Told` has them. most_positions: of the
    largest of this process's. quarantined: rows left out of this step. reliefs: in force, by process."""

    step: StepResult
    plan: tuple[tuple[int, ...], ...]
    most_positions: int
    failures: tuple[Failure, ...] = ()
    quarantined: tuple[int, ...] = ()
    reliefs: tuple[tuple[str, ...], ...] = ()


def safe_step(
    protection: Protection[P],
    pieces: Sequence[P],
    *,
    step: int,
    fits: Callable[[int], bool] | None = None,
    trial: bool = False,
    norms: NormRecorder | None = None,
    shared: SharedStep | None = None,
) -> SafeResult:
    """One optimizer step on these pieces, whatever memory does.

    step: its number, which with the run's seed and a piece's first row is what the piece draws from. fits(positions):
    whether a piece of this size should fit in what is free now, so that its failure is one that passes. trial: forward
    and backward only, of which nothing stays, to see what fits. norms: reads this step's gradients, a trial's too.
    shared: with the processes that compute the other rows of the batch; there may be no piece for this one.

    Raises OutOfMemoryError where a single row does not fit and is not to be left out: parameters, optimizer and
    schedule are then those before the step. Raises RestartError where an unprotected update is torn, or memory runs
    out after the processes' gradients were summed; and what ends another process.
    """
    progress = _Progress(protection, pieces, norms, shared)
    failures: list[Failure] = []
    with streams_kept(protection.device):
        while True:
            outcome = _attempt(protection, progress, step=step, trial=trial)
            if isinstance(outcome, StepResult):
                return SafeResult(
                    step=outcome,
                    plan=progress.plan,
                    most_positions=max((piece.num_positions for piece in progress.done), default=0),
                    failures=tuple(failures),
                    quarantined=tuple(sorted(progress.left_out)),
                    reliefs=progress.told_reliefs or (protection.relieved,),
                )
            is_sharded = protection.work.shards is not None
            progress.recover(again=is_sharded or outcome.place in LATE)
            outcome, fits_now = progress.with_free_bytes(outcome), fits
            if is_sharded:
                outcome, fits_now = _told(protection, outcome, fits)
            action = _next_rung(protection, progress, outcome, failures=failures, fits=fits_now)
            failures.append(replace(outcome, action=action))


class _Progress(Generic[P]):
    """How far a step has come, and what takes it back."""

    def __init__(
        self, protection: Protection[P], pieces: Sequence[P], norms: NormRecorder | None, shared: SharedStep | None
    ) -> None:
        self.protection, self.norms, self.shared = protection, norms, shared
        self.is_shared = False
        self.told_plan: tuple[tuple[int, ...], ...] | None = None
        self.told_reliefs: tuple[tuple[str, ...], ...] = ()
        self.lost_weight = 0.0
        self.pending = list(pieces)
        self.done: list[P] = []
        self.losses: list[Tensor] = []
        self.left_out: set[int] = set()
        self.repeated = False
        self.committed = self._new_buffer()
        self._known = protection.quarantined & {row for piece in pieces for row in piece.row_ids}
        if self._known:
            self.leave_out(self._known)
        self.lost_weight = 0.0  # by this step itself
        self.loss_weight = self._loss_weight()
        self._at_start = self._at_piece = _Buffers(protection)

    @property
    def plan(self) -> tuple[tuple[int, ...], ...]:
        return tuple(piece.row_ids for piece in self.done) if self.told_plan is None else self.told_plan

    @property
    def is_all_of_it(self) -> bool:
        """Whether the pending piece is the whole step, of this process and of all others."""
        return len(self.pending) == 1 and not self.done and self.shared is None

    def goes_on(self) -> bool:
        """Whether there is another pass: here, or in another process of a sharded model. Raises AbortedError."""
        shards = self.protection.work.shards
        return bool(self.pending) if shards is None else shards.more(bool(self.pending))

    def finish(self, loss: Tensor) -> None:
        """The first pending piece is done."""
        self.losses.append(loss)
        self.done.append(self.pending.pop(0))
        if self.norms is not None:
            self.norms.keep(self.done[-1].loss_weight)
        self._at_start.narrow()
        if self.committed is not None and self._at_start:
            self._at_piece = _Buffers(self.protection)

    def recover(self, *, again: bool) -> None:
        """Take back what the failed attempt did: the piece alone where pieces are committed, unless the step must be
        done again as a whole."""
        if (shards := self.protection.work.shards) is not None:
            shards.take_back()
        else:
            self._drop_gradients()
        if again:
            self._forget_scaling()
        if again or self.committed is None:
            self.restart()
        else:
            self._at_piece.put_back()
        if self.protection.device.type == "cpu":
            map_large_blocks()
        release_memory(self.protection.device)

    def with_free_bytes(self, failure: Failure) -> Failure:
        """Once what it can do without is given back."""
        free_bytes = self.protection.free_bytes()
        if free_bytes is None:
            return failure
        kept_bytes = 0 if self.committed is None else self.committed.num_bytes
        return replace(failure, free_bytes=free_bytes, left_bytes=free_bytes + kept_bytes)

    def restart(self) -> None:
        self.pending = self.done + self.pending
        self.done, self.losses = [], []
        self.is_shared, self.told_plan = False, None
        if self.norms is not None:
            self.norms.forget()
        self.committed = self._new_buffer()
        self._at_start.put_back()
        self._at_piece = self._at_start

    def share(self, shared: SharedStep) -> bool:
        """Gradients, losses and norms become those of all processes. Whether there is anything to learn from. Memory is
        needed before the others are told of anything, and not afterwards."""
        shards = self.protection.work.shards
        gradients: list[Tensor] = []
        missing: tuple[int, ...] = ()
        if shards is None:
            gradients, missing = self._filled_gradients() if self.committed is None else self.committed.filled()
        none = torch.zeros(0, device=self.protection.device)
        norms, weights = (none, ()) if self.norms is None else self.norms.kept()
        host = torch.cat((torch.stack(self.losses).float(), norms) if self.losses else (norms,)).tolist()
        losses, norm_values = host[: len(self.losses)], host[len(self.losses) :]
        left_out = tuple(sorted(self.left_out - self._known))
        own = Told(
            plan=self.plan,
            losses=tuple(losses),
            norms=tuple(norm_values),
            weights=weights,
            left_out=left_out,
            lost_weight=self.lost_weight,
            missing=missing,
            reliefs=(self.protection.relieved,),
        )
        if shards is not None:
            shards.ready()
        self.is_shared = True
        every = sum_up(own, gradients, shared)
        self.told_plan, self.told_reliefs = every.plan, every.reliefs
        self.left_out |= set(every.left_out)
        self.protection.quarantined |= set(every.left_out)
        self.loss_weight = left_weight(shared.loss_weight, every.lost_weight)
        if self.loss_weight == 0:
            self._drop_gradients()
            return False
        if self.committed is None:
            trained = _trained(self.protection.work.model)
            for place in every.missing:
                trained[place].grad = None
        else:
            self.committed.drop(every.missing)
        self.losses = list(torch.tensor(every.losses, device=self.protection.device))
        if self.norms is not None:
            self.norms.take(every.norms, every.weights)
        return True

    def forget(self) -> None:
        """After a trial, or where another process ends the step: no gradient, changed buffer or unscaling stays."""
        self._drop_gradients()
        self._forget_scaling()
        self._at_start.put_back()

    def leave_out(self, row_ids: Collection[int]) -> None:
        self.left_out |= set(row_ids)
        before = sum(piece.loss_weight for piece in self.pending)
        kept = [self.protection.work.without(piece, row_ids) for piece in self.pending]
        self.pending = [piece for piece in kept if piece is not None]
        self.lost_weight += before - sum(piece.loss_weight for piece in self.pending)
        self.loss_weight = self._loss_weight()

    def _forget_scaling(self) -> None:
        """The scaler keeps its scale and forgets that it has unscaled."""
        if (scaler := self.protection.work.scaler) is not None:
            scaler.update(new_scale=scaler.get_scale())

    def _drop_gradients(self) -> None:
        for parameter in self.protection.work.model.parameters():
            parameter.grad = None

    def _filled_gradients(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """As `CommitBuffer.filled`, of `.grad`."""
        trained = _trained(self.protection.work.model)
        missing = tuple(place for place, parameter in enumerate(trained) if parameter.grad is None)
        for place, zeros in zip(missing, [torch.zeros_like(trained[place]) for place in missing], strict=True):
            trained[place].grad = zeros
        return [parameter.grad for parameter in trained if parameter.grad is not None], missing

    def _loss_weight(self) -> float:
        if self.shared is not None:
            return left_weight(self.shared.loss_weight, self.lost_weight)
        return sum(piece.loss_weight for piece in self.pending)

    def _new_buffer(self) -> CommitBuffer | None:
        return CommitBuffer(self.protection.work.model) if self.protection.work.commit else None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Buffers:
    """A copy of the buffers that forwards change, as a batch norm does. Which they are is seen at the first piece, for
    which all are copied: a change raises a tensor's version, and some kernels change a module's other buffers without
    that, so a module's buffers are taken together."""

    def __init__(self, protection: Protection[P]) -> None:
        self._protection = protection
        slots = protection.watched
        if slots is None:
            slots = [(module, name) for module in protection.work.model.modules() for name in module._buffers]
        self._copies = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module, name in slots
            if (buffer := module._buffers.get(name)) is not None
        ]

    def __bool__(self) -> bool:
        return bool(self._copies)

    def narrow(self) -> None:
        """After the run's first piece: only what it changed is watched from now on."""
        if self._protection.watched is None:
            moved = {
                module
                for module, name, buffer, version, _ in self._copies
                if module._buffers.get(name) is not buffer or buffer._version != version
            }
            self._copies = [copy for copy in self._copies if copy[0] in moved]
            self._protection.watched = [(module, name) for module, name, *_ in self._copies]

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, _, values in self._copies:
            module._buffers[name] = buffer
            buffer.copy_(values)


def _attempt(protection: Protection[P], progress: _Progress[P], *, step: int, trial: bool) -> Failure | StepResult:
    """Everything that is pending. A failure is told in numbers and words: whoever receives it holds no tensor."""
    work, shared = protection.work, progress.shared
    shards = work.shards
    if progress.loss_weight == 0:
        progress.done, progress.pending = progress.pending, []
        if shared is None or trial:  # else the others wait to be told
            return NOTHING_TO_LEARN
    place: Place = "forward"
    piece = next(iter(progress.pending or progress.done), None)
    try:
        while progress.goes_on():
            place = "forward"
            if not progress.pending:
                assert work.idle_share is not None
                piece = None
                backward(work.idle_share(), work.scaler)
                continue
            piece = progress.pending[0]
            seed = micro_batch_seed(protection.seed, step=step, first_row_id=piece.row_ids[0])
            seed_streams(seed, protection.device)
            loss = work.loss_share(piece, progress.loss_weight)
            place = "backward"
            loss = backward(loss, work.scaler, progress.norms, alone=progress.is_all_of_it)
            place = "commit"
            if progress.committed is not None:
                progress.committed.add()
            progress.finish(loss)
        if trial and progress.norms is None:
            progress.forget()
            return NOTHING_TO_LEARN
        place = "sum"
        if shared is not None and not progress.share(shared):
            return NOTHING_TO_LEARN
        place = "clip"
        if progress.committed is not None:
            progress.committed.hand_over()
        clipped = clip_gradients(
            work.optimizer, progress.losses, clip=work.clip, scaler=work.scaler, norms=progress.norms, shards=shards
        )
        if trial:
            progress.forget()
            return replace(NOTHING_TO_LEARN, norms=clipped.norms)
        if shards is not None:
            shards.ready()
        place = "update"
        updated = update(work.optimizer, clipped.grad_norm, scaler=work.scaler, protected=work.commit)
        return StepResult(clipped.loss, clipped.grad_norm, progress.loss_weight, updated, clipped.norms)
    except AbortedError:
        return ELSEWHERE
    except Exception as error:
        if shards is not None and place != "update":
            shards.leave()
        where = memory_failure(error)
        if where is None:
            if progress.is_shared:
                progress.forget()
            raise
        if progress.is_shared and (shards is None or place == "update"):
            raise RestartError(
                f"out of memory in the {place}, after the gradients of all processes were summed: start again from the "
                "last checkpoint"
            ) from error
        row_ids = () if piece is None else piece.row_ids
        if where == "host":
            raise OutOfMemoryError(
                f"the machine's own memory ran out in the {place} of {len(row_ids)} samples: close other programs, "
                "or use a smaller model or less data"
            ) from error
        num_positions = 0 if piece is None else piece.num_positions
        return Failure(place=place, row_ids=row_ids, num_positions=num_positions, needed_bytes=needed_bytes(error))


def _told(
    protection: Protection[P], own: Failure, fits: Callable[[int], bool] | None
) -> tuple[Failure, Callable[[int], bool] | None]:
    """(the failure for which all processes go back, what its own process says of its size). Of several the first."""
    shards = protection.work.shards
    assert shards is not None
    fits_again = own.place != ELSEWHERE.place and fits is not None and fits(own.num_positions)
    own = replace(own, rank=shards.peers.rank)
    told = shards.peers.exchange((own, fits_again))
    failure, fits_again = next(each for each in told if each[0].place != ELSEWHERE.place)
    return failure, lambda _: fits_again


def _next_rung(
    protection: Protection[P],
    progress: _Progress[P],
    failure: Failure,
    *,
    failures: Sequence[Failure],
    fits: Callable[[int], bool] | None,
) -> str:
    """What is done about the failure, as a clause. Raises OutOfMemoryError at the end of the ladder."""
    if len(failures) + 1 >= MOST_ATTEMPTS:
        raise OutOfMemoryError(f"{no_room(failure)} after {MOST_ATTEMPTS} attempts: another process takes the memory")
    if failure.place in LATE:
        if sum(earlier.place in LATE for earlier in failures) + 1 >= MOST_UPDATES:
            raise OutOfMemoryError(
                f"{no_room(failure)}, which no smaller micro-batch needs less for: use optim.name=adamw"
            )
        return "the step is done again"
    if not progress.repeated and fits is not None and fits(failure.num_positions):
        progress.repeated = True
        return "done again at the same size, which fits in what is free now"
    if len(failure.row_ids) > 1:
        most_positions = failure.num_positions // 2
        progress.pending = [
            part
            for piece in progress.pending
            for part in (
                protection.work.split(piece, most_positions) if piece.num_positions > most_positions else [piece]
            )
        ]
        return f"split into micro-batches of at most {most_positions:,} tokens with padding"
    if protection.reliefs:
        name = protection.reliefs[0].name
        protection.relieve(name)
        progress.restart()  # the whole step, so that it can be done again from its plan and reliefs
        return f"{name} from now on"
    if protection.quarantine:
        protection.quarantined.add(failure.row_ids[0])
        progress.restart()
        progress.leave_out(failure.row_ids)
        return f"sample {failure.row_ids[0]} is left out from now on"
    tried = f" and with {', '.join(protection.relieved)}" if protection.relieved else ""
    raise OutOfMemoryError(f"{no_room(failure)}, alone{tried}: {protection.way_out}")


def no_room(failure: Failure) -> str:
    """What was missing, as the beginning of a sentence."""
    needed = "" if failure.needed_bytes is None else f" for {format_bytes(failure.needed_bytes)}"
    return f"no memory{needed} in the {failure.where} with {format_bytes(failure.free_bytes)} free"
