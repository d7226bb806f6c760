"""Decides what a step changes when memory runs out: the first of several actions that applies."""

from collections.abc import Callable, Sequence

from fitune.errors import OutOfMemoryError
from fitune.recovery.attempt import Attempt
from fitune.recovery.failure import LATE, Failure, missing_memory
from fitune.step.progress import P

#: Attempts at one step. Halving reaches a single sample in 20 attempts from a million padded
#: tokens; if more are needed, something else is wrong.
MOST_ATTEMPTS = 40
#: What follows the last piece needs little memory, and smaller pieces would not help it.
MOST_LATE_FAILURES = 2


def choose_action(
    attempt: Attempt[P],
    failure: Failure,
    *,
    failures: Sequence[Failure],
    fits: Callable[[int], bool] | None,
) -> str:
    """Change the attempt so that it may fit, and return what was done, as a clause.

    failures: the earlier failures of this step.

    Raises OutOfMemoryError if nothing is left to try.
    """
    if len(failures) + 1 >= MOST_ATTEMPTS:
        raise OutOfMemoryError(
            f"{missing_memory(failure)} after {MOST_ATTEMPTS} attempts: "
            "another process takes the memory"
        )
    if failure.place in LATE:
        return _do_again(failure, failures)
    if not attempt.repeated and fits is not None and fits(failure.num_positions):
        attempt.repeated = True
        return "done again at the same size, which fits in what is free now"
    for act in (_split, _fall_back, _leave_out):
        if action := act(attempt, failure):
            return action
    applied = attempt.protection.applied
    tried = f" and with {', '.join(applied)}" if applied else ""
    raise OutOfMemoryError(f"{missing_memory(failure)}, alone{tried}: {attempt.protection.way_out}")


def _do_again(failure: Failure, failures: Sequence[Failure]) -> str:
    if sum(earlier.place in LATE for earlier in failures) + 1 >= MOST_LATE_FAILURES:
        raise OutOfMemoryError(
            f"{missing_memory(failure)}, which no smaller micro-batch needs less for: "
            "use optim.name=adamw"
        )
    return "the step is done again"


def _split(attempt: Attempt[P], failure: Failure) -> str | None:
    """Halve the pieces that are as large as the failed one, if that has more than one sample."""
    if len(failure.row_ids) <= 1:
        return None
    most_positions = failure.num_positions // 2
    split = attempt.protection.work.split
    attempt.pending = [
        part
        for piece in attempt.pending
        for part in (
            split(piece, most_positions) if piece.num_positions > most_positions else [piece]
        )
    ]
    return f"split into micro-batches of at most {most_positions:,} tokens with padding"


def _fall_back(attempt: Attempt[P], failure: Failure) -> str | None:
    """Apply the next fallback from now on."""
    protection = attempt.protection
    if not protection.fallbacks:
        return None
    name = protection.fallbacks[0].name
    protection.apply(name)
    # A replay repeats the step from its plan and fallbacks, so one step must not mix fallbacks.
    attempt.restart()
    return f"{name} from now on"


def _leave_out(attempt: Attempt[P], failure: Failure) -> str | None:
    """Leave out the sample that does not fit alone."""
    if not attempt.protection.quarantine or not failure.row_ids:
        return None
    row_id = failure.row_ids[0]
    attempt.restart()
    attempt.leave_out(row_id)
    return f"sample {row_id} is left out from now on"
