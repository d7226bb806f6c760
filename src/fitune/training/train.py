"""Trains a run to its end, and leaves it saved and summarised however it ends."""

from fitune.errors import InterruptedRunError, OutOfMemoryError, RunDirectoryError
from fitune.machine.out_of_memory import memory_failure, said_of
from fitune.run.metrics import Status, Summary
from fitune.training.loop import TrainingLoop
from fitune.training.saving import LAST_SAVE_SECONDS
from fitune.training.signals import deferred_signals


def train(loop: TrainingLoop) -> Summary:
    """Train until the run is over, and return its summary.

    Raises InterruptedRunError after a signal, FituneError if the loss stays not finite or a replay
    differs, and RunDirectoryError if the final state cannot be saved. In every case `run.last` has
    the weights of the last saved step.
    """
    run = loop.run
    status: Status = "failed"
    patience = 0.0
    try:
        with deferred_signals() as caught:
            status = loop.run_to_the_end(caught)
        patience = LAST_SAVE_SECONDS
    except KeyboardInterrupt:
        status = "stopped"
        loop.event("stopped", "interrupted at once, without saving")
        raise
    except Exception as error:
        if memory_failure(error) is None:
            raise
        raise OutOfMemoryError(
            f"{said_of(error)} beside the steps: close other programs; fitune train --resume {run.path} goes on from "
            "the last checkpoint"
        ) from error
    finally:
        loop.saver.close()  # nothing may be written after the run's lock is released
        summary = loop.write_summary(status)
        lost = loop.log.files.close(patience=patience)
        if lost is not None:
            loop.watcher.note(f"warning: {lost}")
    if lost is not None:
        raise RunDirectoryError(f"{lost}; the weights of step {summary.steps} are in {run.last}")
    if caught and status == "stopped":
        where = f"saved after step {summary.steps} in {run.last}"
        interrupted = InterruptedRunError(
            f"interrupted: {where}; fitune train --resume {run.path} goes on"
        )
        interrupted.exit_code = 128 + caught[0]
        raise interrupted
    return summary
