"""An optimizer step that running out of memory neither changes nor ends.

`safe_step` calls `optimizer_step`. Where memory runs out inside it, the error and its frames are dropped, gradients and
buffers are put back, memory is given back to the device, `ladder.choose_action` decides what changes, and the step goes
on. The samples of the step, the weight N that they are divided by and the learning rate stay what they are, so the
gradient does too.

A step either repeats the failed piece alone, where the gradients of complete pieces have a buffer of their own
(`StepSettings.commit`), or begins again. Of a model that is sharded over several processes every pass is one of all: a
failure in one of them is told to all, and all begin the step again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fitune.batch_size.norms import NormRecorder
from fitune.distributed.sharding import AbortedError
from fitune.errors import OutOfMemoryError, RestartError
from fitune.machine.out_of_memory import memory_failure, needed_bytes
from fitune.recovery.attempt import Attempt
from fitune.recovery.failure import ELSEWHERE, LATE, Failure
from fitune.recovery.ladder import choose_action
from fitune.recovery.protection import Protection
from fitune.step.peers import ALONE, Alone
from fitune.step.progress import P, Progress, Work
from fitune.step.random_state import streams_kept
from fitune.step.step import (
    NOTHING_TO_LEARN,
    StepResult,
    accumulate,
    clipped_gradient,
    optimizer_step,
)

Fits = Callable[[int], bool]
"""(positions) -> whether a piece of this size should fit in what is free now, so that its failure will pass."""


@dataclass(frozen=True, slots=True)
class SafeResult:
    """What a step did, and what it met with."""

    step: StepResult
    #: the row ids of each piece that the update is made of, in order; see `StepReport.plan`
    plan: tuple[tuple[int, ...], ...]
    #: of the largest piece of this process
    most_positions: int
    failures: tuple[Failure, ...] = ()
    #: rows left out of this step
    quarantined: tuple[int, ...] = ()
    #: what saves memory from now on, by process
    fallbacks: tuple[tuple[str, ...], ...] = ()


def safe_step(
    protection: Protection[P],
    pieces: Sequence[P],
    *,
    step: int,
    fits: Fits | None = None,
    norms: NormRecorder | None = None,
    peers: Alone = ALONE,
) -> SafeResult:
    """Do one optimizer step on these pieces, whatever memory does.

    step: its number, which with the run's seed and a piece's first row seeds what the piece draws. norms: reads this
    step's gradients. peers: the processes that compute the other rows of the batch; there may be no piece for this one.

    Raises OutOfMemoryError where a single row does not fit and is not to be left out: parameters, optimizer and
    schedule are then those before the step. Raises RestartError where an unprotected update is torn, or memory runs
    out after the processes' gradients were summed; and what ends another process.
    """
    return _survive(
        Attempt(protection, pieces, step=step, norms=norms, peers=peers), optimizer_step, fits
    )


def try_pieces(
    protection: Protection[P], pieces: Sequence[P], *, peers: Alone = ALONE
) -> SafeResult:
    """Compute forward and backward of these pieces to see whether they fit. Nothing of it stays."""

    def trial(work: Work[P], progress: Progress[P]) -> StepResult:
        accumulate(work, progress)
        return NOTHING_TO_LEARN

    attempt = Attempt(protection, pieces, step=0, peers=peers)
    result = _survive(attempt, trial, None)
    attempt.forget()
    return result


def read_norms(
    protection: Protection[P], pieces: Sequence[P], norms: NormRecorder, *, fits: Fits | None
) -> SafeResult:
    """Compute the gradient of these pieces for its norms, `SafeResult.step.norms`, without an update."""

    def read(work: Work[P], progress: Progress[P]) -> StepResult:
        clipped = clipped_gradient(work, progress)
        return (
            NOTHING_TO_LEARN if clipped is None else replace(NOTHING_TO_LEARN, norms=clipped.norms)
        )

    attempt = Attempt(protection, pieces, step=0, norms=norms)
    result = _survive(attempt, read, fits)
    attempt.forget()
    return result


def _survive(
    attempt: Attempt[P], compute: Callable[[Work[P], Progress[P]], StepResult], fits: Fits | None
) -> SafeResult:
    protection = attempt.protection
    failures: list[Failure] = []
    with streams_kept(attempt.device):
        while True:
            try:
                result = compute(protection.work, attempt)
            except Exception as error:
                failed = _failure(error, attempt)
                if failed is None:
                    raise
            else:
                return SafeResult(
                    step=result,
                    plan=attempt.plan,
                    most_positions=max((piece.num_positions for piece in attempt.done), default=0),
                    failures=tuple(failures),
                    quarantined=tuple(sorted(attempt.known_left_out | attempt.left_out)),
                    fallbacks=(protection.applied,)
                    if attempt.total is None
                    else attempt.total.fallbacks,
                )
            # outside of `except`, so that the error's frames hold no tensor any more
            attempt.take_back(again=attempt.peers.go_back_together or failed.place in LATE)
            failed, fits_now = attempt.with_free_bytes(failed), fits
            if attempt.peers.go_back_together:
                failed, fits_now = _first_failure(attempt.peers, failed, fits)
            action = choose_action(attempt, failed, failures=failures, fits=fits_now)
            failures.append(replace(failed, action=action))


def _failure(error: Exception, attempt: Attempt[P]) -> Failure | None:
    """Describe an error that came of a lack of memory; None for any other. Raises what cannot be recovered from."""
    if isinstance(error, AbortedError):
        return ELSEWHERE
    place, peers = attempt.place, attempt.peers
    if place != "update":
        peers.leave()
    piece = next(iter(attempt.pending), None)
    failure = Failure(
        place=place,
        row_ids=() if piece is None else piece.row_ids,
        num_positions=0 if piece is None else piece.num_positions,
        needed_bytes=needed_bytes(error),
    )
    where = memory_failure(error)
    if where is None:
        if attempt.is_summed:
            attempt.forget()
        return None
    if attempt.is_summed and (place == "update" or not peers.go_back_together):
        raise RestartError(
            f"out of memory in the {place}, after the gradients of all processes were summed: start again from the "
            "last checkpoint"
        ) from error
    if where == "host":
        raise OutOfMemoryError(
            f"the machine's own memory ran out in the {failure.where}: close other programs, "
            "or use a smaller model or less data"
        ) from error
    return failure


def _first_failure(peers: Alone, own: Failure, fits: Fits | None) -> tuple[Failure, Fits | None]:
    """Agree on the failure for which all processes go back; of several that of the first process."""
    fits_again = own.place != ELSEWHERE.place and fits is not None and fits(own.num_positions)
    reported = peers.exchange((replace(own, rank=peers.rank), fits_again))
    failure, fits_again = next(each for each in reported if each[0].place != ELSEWHERE.place)
    return failure, lambda _: fits_again
