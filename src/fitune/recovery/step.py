"""Does an optimizer step that survives running out of memory.

`safe_step` calls `optimizer_step`. If memory runs out inside it, the error and its stack frames are
dropped, gradients and buffers are restored, memory is given back to the device,
`actions.choose_action` decides what changes, and the step goes on. Its samples, the weight N that
their losses are divided by, and the learning rate stay the same, so the gradient does too.

A failed step repeats only the failed piece if the gradients of finished pieces are in a buffer of
their own (`StepSettings.commit`); otherwise it begins again. If the model is sharded over several
processes, they compute each pass together: a failure in one of them is reported to all, and all
begin the step again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fitune.batch_size.norms import NormRecorder
from fitune.distributed.sharding import AbortedError
from fitune.errors import OutOfMemoryError, RestartError
from fitune.machine.out_of_memory import memory_failure, needed_bytes
from fitune.recovery.actions import choose_action
from fitune.recovery.attempt import Attempt
from fitune.recovery.failure import ELSEWHERE, LATE, Failure
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

#: Tells whether a piece of so many padded tokens should fit in what is free now, so that it may
#: succeed if it is done again.
Fits = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class SafeResult:
    """The result of a safe step."""

    step: StepResult
    #: the row ids of each piece that the update is made of, in order; see `StepReport.plan`
    plan: tuple[tuple[int, ...], ...]
    #: padded tokens of this process's largest piece
    most_positions: int
    failures: tuple[Failure, ...] = ()
    #: row ids of the samples left out of this step
    quarantined: tuple[int, ...] = ()
    #: names of the fallbacks in force from now on, by process
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
    """Do one optimizer step on these pieces, and adapt it each time memory runs out.

    step: its number. With the run's seed and a piece's first row id it seeds the piece's random
        draws.
    norms: reads this step's gradients.
    peers: the processes that compute the other samples of the batch. This one may have no piece.

    Raises OutOfMemoryError if a single sample does not fit and must not be left out; parameters,
    optimizer and schedule are then as before the step. Raises RestartError if memory runs out
    within an update that cannot be undone, or after the gradients of all processes were summed.
    Raises the error of another process that fails.
    """
    return _survive(
        Attempt(protection, pieces, step=step, norms=norms, peers=peers), optimizer_step, fits
    )


def try_pieces(
    protection: Protection[P], pieces: Sequence[P], *, peers: Alone = ALONE
) -> SafeResult:
    """Compute forward and backward of these pieces to see whether they fit, and undo their effects."""

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
    """Compute the gradient of these pieces without an update, and return its norms."""

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
            # outside of `except`, where the error's stack frames hold no tensors any more
            attempt.take_back(again=attempt.peers.go_back_together or failed.place in LATE)
            failed, fits_now = attempt.with_free_bytes(failed), fits
            if attempt.peers.go_back_together:
                failed, fits_now = _first_failure(attempt.peers, failed, fits)
            action = choose_action(attempt, failed, failures=failures, fits=fits_now)
            failures.append(replace(failed, action=action))


def _failure(error: Exception, attempt: Attempt[P]) -> Failure | None:
    """Describe an error that was caused by a lack of memory; return None for any other error.

    Raises OutOfMemoryError or RestartError if the step cannot recover from it.
    """
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
    """Exchange the processes' failures, and return that of the first process that failed.

    All processes then go back because of the same failure.
    """
    fits_again = own.place != ELSEWHERE.place and fits is not None and fits(own.num_positions)
    reported = peers.exchange((replace(own, rank=peers.rank), fits_again))
    failure, fits_again = next(each for each in reported if each[0].place != ELSEWHERE.place)
    return failure, lambda _: fits_again
