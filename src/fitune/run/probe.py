"""probe.json: settings that were tried from the same state before a run began, and which one the run goes on with."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fitune.run.directory import write_json
from fitune.run.interval import ConfidenceInterval
from fitune.run.metrics import as_json

NUM_COMPARED = 3
LEVEL = 1 - 0.05 / NUM_COMPARED
"""Of one interval, so that all of them together are right in 95 % of probes (Bonferroni)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A setting and what it came to. lr, rows: its peak rate and effective batch. eval_loss: on the held-out rows
    after `tokens` tokens; inf where it diverged. difference: of the rows' losses to the first branch, which is the
    configuration; None for that one, and where one of the two diverged."""

    name: str
    lr: float
    rows: int
    steps: int
    tokens: int
    seconds: float
    eval_loss: float
    difference: ConfidenceInterval | None = None

    def __str__(self) -> str:
        loss = f"eval loss {self.eval_loss:.4f}" if math.isfinite(self.eval_loss) else "diverged"
        of = self.difference
        beside = "" if of is None else f", {of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})"
        return f"{self.name:33} rate {self.lr:<8.3g} {self.rows:4} samples  {self.steps:5,} steps  {loss}{beside}"

    @property
    def is_better(self) -> bool:
        """Than the configuration, by more than chance."""
        return self.difference is not None and self.difference.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """noise_*_rows: the noise scale before training with its one-sided 95 % bounds, None where no signal was seen or
    it may be endless. branches: the configuration first."""

    noise_scale_rows: float | None
    noise_low_rows: float | None
    noise_high_rows: float | None
    branches: tuple[Branch, ...]

    @property
    def chosen(self) -> int:
        return choose(self.branches)

    @property
    def cost_tokens(self) -> int:
        """Spent on the branches that do not go on."""
        return sum(
            branch.tokens for number, branch in enumerate(self.branches) if number != self.chosen
        )

    @property
    def verdict(self) -> str:
        best, others = self.branches[self.chosen], self.branches[1:]
        if self.chosen:
            why = (
                "is better by more than chance"
                if best.is_better
                else "did not diverge as the configuration did"
            )
            return f"{best.name} {why}: the run goes on with rate {best.lr:.3g} and {best.rows} samples a step"
        equal = [
            each.name
            for each in others
            if each.difference is not None and not each.difference.excludes_zero
        ]
        if equal:
            return f"no difference found between the configuration and {' and '.join(equal)}: the run keeps its setting"
        return "the configuration is better than every other setting by more than chance: the run keeps it"


def choose(branches: Sequence[Branch]) -> int:
    """The index of the one with the lowest loss among those that are better than the first by more than chance; 0, the
    configuration, where none is. Where the configuration diverged, any that did not is better."""
    diverged = not math.isfinite(branches[0].eval_loss)
    better = [
        number
        for number, branch in enumerate(branches)
        if branch.is_better or (diverged and math.isfinite(branch.eval_loss))
    ]
    return min(better, key=lambda number: branches[number].eval_loss, default=0)


def write_probe(path: Path, probe: Probe) -> None:
    """Raises RunDirectoryError."""
    branches = [
        as_json(replace(branch, difference=None))
        | {"difference": branch.difference and asdict(branch.difference)}
        for branch in probe.branches
    ]
    derived = {"chosen": probe.chosen, "cost_tokens": probe.cost_tokens, "verdict": probe.verdict}
    write_json(
        path, {"schema": 1, **as_json(replace(probe, branches=())), "branches": branches, **derived}
    )
