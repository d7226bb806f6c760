"""Defines what follows a run while it happens: a screen, a tracker, the monitor."""

from dataclasses import dataclass
from typing import Protocol

from fitune.run.metrics import EvalMetrics, StepMetrics


class Watcher(Protocol):
    """Is called with every step, evaluation and event of a run."""

    def step(self, metrics: StepMetrics, *, progress: float) -> None: ...

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Watchers:
    """Several watchers that act as one."""

    watchers: tuple[Watcher, ...]

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        for watcher in self.watchers:
            watcher.step(metrics, progress=progress)

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None:
        for watcher in self.watchers:
            watcher.evaluation(metrics, best=best)

    def note(self, text: str) -> None:
        for watcher in self.watchers:
            watcher.note(text)
