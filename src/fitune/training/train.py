"""Trains a run to its end, and leaves it saved and summarised however it ends."""

from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.config import RunConfig
from fitune.distributed.processes import Ranks
from fitune.errors import InterruptedRunError, OutOfMemoryError, RunDirectoryError
from fitune.machine.out_of_memory import memory_failure, said_of
from fitune.run.directory import RunDirectory
from fitune.run.metrics import Status, Summary
from fitune.run.watcher import Watcher
from fitune.step.assemble import Setup
from fitune.training.loop import Data, TrainingLoop
from fitune.training.resume import Replay, Start
from fitune.training.saving import LAST_SAVE_SECONDS
from fitune.training.self_check import SelfCheck
from fitune.training.signals import deferred_signals


def train(
    config: RunConfig,
    setup: Setup,
    run: RunDirectory,
    *,
    data: Data,
    tokenizer: Tokenizer,
    watcher: Watcher,
    self_check: SelfCheck | None = None,
    start: Start | None = None,
    replay: Replay | None = None,
    ranks: Ranks | None = None,
    until: int | None = None,
) -> Summary:
    """Train until the run is over, and return its summary.

    self_check: the prediction of the second step, which is compared with the measured memory.
    start: where a resumed run continues; its weights and random numbers are restored already.
    replay: the steps to repeat, and the results that they must have.
    ranks: the processes that train together. Each calls this; only the first one writes.
    until: the number of samples after which the run saves and stops, as after a signal.

    Raises InterruptedRunError after a signal, FituneError if the loss stays not finite or a replay
    differs, and RunDirectoryError if the final state cannot be saved. In every case `run.last` has
    the weights of the last saved step.
    """
    ranks = ranks or Ranks()
    loop = TrainingLoop(
        config, setup, run, data, tokenizer, watcher, self_check, start, replay, ranks, until
    )
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
            watcher.note(f"warning: {lost}")
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
