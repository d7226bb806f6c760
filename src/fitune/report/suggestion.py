"""Defines one piece of advice on a run, and the command that follows it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fitune.language import say
from fitune.report.run_on_disk import RecordedRun
from fitune.units import format_bytes

Effect = Literal["same", "close", "different"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A change that would improve a run."""

    #: what to change, as text
    change: str
    effect_on_result: Effect
    #: what the advice is based on, as text
    evidence: str
    #: the command of a run with this change; empty if there is none
    command: str = ""
    #: None where unknown
    bytes_saved: int | None = None
    #: 0.1 for ten per cent faster; None where unknown
    speed_fraction: float | None = None
    #: 2 if the run is broken, 1 if it wastes memory or time, 0 if the change may not be needed
    urgency: int = 1

    @property
    def memory(self) -> str:
        if self.bytes_saved is None:
            return "n/a"
        return f"{'-' if self.bytes_saved >= 0 else '+'}{format_bytes(abs(self.bytes_saved))}"

    @property
    def speed(self) -> str:
        if self.speed_fraction is None:
            return "n/a"
        return f"{self.speed_fraction:+.0%}".replace("-0%", "+0%")

    @property
    def effect(self) -> str:
        names = {"same": say("same"), "close": say("close"), "different": say("different")}
        return names[self.effect_on_result]


def command_for(run: RecordedRun, *changes: str) -> str:
    """Return the command that trains like `run`, with these overrides and under a new name."""
    source = f"{run.path}/config.yaml" if run.origin == "fitune" else "CONFIG"
    return f"fitune train {source} run.name={run.name}-2 {' '.join(changes)}"


def diverges(run: RecordedRun) -> bool:
    """Return whether the loss is not a number at the end, or far above that of the first step."""
    loss = run.train["loss"]
    finite = loss[np.isfinite(loss)]
    return len(loss) > 0 and bool(
        not np.isfinite(loss[-1]) or (len(finite) > 10 and finite[-5:].mean() > 1.5 * finite[0])
    )
