"""Saves a run's state, reports saves that failed, and repeats the last save until it succeeds."""

import time
from collections.abc import Callable

from fitune.distributed.processes import Ranks
from fitune.errors import RunDirectoryError
from fitune.training.checkpoint.files import Json
from fitune.training.checkpoint.write import CheckpointWriter
from fitune.training.log import RunLog
from fitune.training.state import RunState

#: How long the last save of a run, and the writing of its last log lines, are tried again. What
#: cannot be saved by then is lost.
LAST_SAVE_SECONDS = 20.0
SAVE_AGAIN_SECONDS = 1.0


class Saver:
    """Saves a run's state as checkpoints.

    saved: the state that is on the disk already, as `RunState.commit` identifies it.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        log: RunLog,
        ranks: Ranks,
        *,
        saved: tuple[int, int] | None,
    ) -> None:
        self._writer, self._log, self._ranks = writer, log, ranks
        self._saved = saved

    @property
    def failed_step(self) -> int | None:
        """The step of the last save if that failed."""
        return self._writer.failed_step

    def is_saved(self, state: RunState) -> bool:
        """Return whether the state is saved or being saved."""
        return self._saved == state.commit

    def begin(self, state: RunState, *, memory_model: Json) -> None:
        self._writer.save(state, memory_model=memory_model)
        self._saved = state.commit

    def wait(self) -> None:
        """Wait until nothing is being saved."""
        self._writer.wait()

    def close(self) -> None:
        self._writer.close()

    def report(self, *, step: int, wait: bool = False) -> None:
        """Log a save that failed and lines that could not be written.

        Neither ends the run, since the next attempt may succeed.
        """
        if wait:
            self._writer.wait()
        if (failure := self._writer.failure()) is not None:
            self._log.event("save_failed", f"warning: {failure}; the run goes on", step=step)
        for news in self._log.files.take_news():
            self._log.event("files_wait", news, step=step)

    def save_last(self, save: Callable[[], None], *, step: int) -> None:
        """Call `save`, wait until it has saved the state, and repeat this while it fails.

        Raises RunDirectoryError if every attempt fails for LAST_SAVE_SECONDS.
        """
        self.report(step=step, wait=True)
        deadline = time.perf_counter() + LAST_SAVE_SECONDS
        if self._ranks.exchange(self._writer.failed_step)[0] == step:
            self._saved = None
        while True:
            save()
            self._writer.wait()
            is_late = time.perf_counter() >= deadline
            failure, is_late = self._ranks.exchange((self._writer.failure(), is_late))[0]
            if failure is None:
                return
            if is_late:
                raise RunDirectoryError(f"{failure}; the checkpoint before it is whole")
            self._log.note(
                f"warning: {failure}; it is tried again for up to {LAST_SAVE_SECONDS:.0f} s: make room"
            )
            self._saved = None
            time.sleep(SAVE_AGAIN_SECONDS)
