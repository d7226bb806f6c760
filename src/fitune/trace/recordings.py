"""Recordings of one process, kept, so that further settings of one configuration cost little.

A planner asks for many settings of one model: each is answered from what was recorded before where that is exact, and
recorded afresh where it is not.
"""

from collections.abc import Sequence

from fitune.config import RunConfig
from fitune.trace.cuda_behaviour import CudaTarget
from fitune.trace.step import Pass, RecordedStep, record_step


class Recordings:
    """Grows with each question. Answers are equal to those of `record_step`, event by event."""

    def __init__(self) -> None:
        self._answers: dict[object, RecordedStep] = {}

    def step(self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None) -> RecordedStep:
        """As `record_step` on fake tensors."""
        what = config.model, config.data.packing, config.batch, config.optim, config.loss, config.eval
        key = repr((what, tuple(passes), target))
        if key not in self._answers:
            self._answers[key] = record_step(config, passes, target=target)
        return self._answers[key]
