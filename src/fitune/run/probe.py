"""Describes a probe (probe.json): the settings that were tried before a run, and the chosen one."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fitune.run.files import write_json
from fitune.run.interval import ConfidenceInterval
from fitune.run.metrics import as_json

NUM_COMPARED = 3
#: The level of one interval, so that all intervals together are right in 95 % of probes
#: (Bonferroni).
LEVEL = 1 - 0.05 / NUM_COMPARED


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A setting that was tried, and its result."""

    name: str
    #: the peak rate
    lr: float
    #: samples in the effective batch
    rows: int
    steps: int
    tokens: int
    seconds: float
    #: on the held-out samples after `tokens` tokens; inf if the branch diverged
    eval_loss: float
    #: of the samples' losses from those of the first branch, which has the configured setting; None
    #: for the first branch, and if one of the two diverged
    difference: ConfidenceInterval | None = None

    def __str__(self) -> str:
        loss = f"eval loss {self.eval_loss:.4f}" if math.isfinite(self.eval_loss) else "diverged"
        of = self.difference
        beside = "" if of is None else f", {of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})"
        return f"{self.name:33} rate {self.lr:<8.3g} {self.rows:4} samples  {self.steps:5,} steps  {loss}{beside}"

    @property
    def is_better(self) -> bool:
        """Whether it is better than the configured setting by more than chance."""
        return self.difference is not None and self.difference.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The result of a probe."""

    #: the noise scale before training, in samples, with one-sided 95 % bounds; None if it is
    #: unknown or may be infinite
    noise_scale_rows: float | None
    noise_low_rows: float | None
    noise_high_rows: float | None
    #: the configured setting first
    branches: tuple[Branch, ...]

    @property
    def chosen(self) -> int:
        return choose(self.branches)

    @property
    def cost_tokens(self) -> int:
        """The tokens of the branches that are not continued."""
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
    """Return the index of the best branch: the configured one (0) unless another is clearly better.

    Among those that are better by more than chance, it is the one with the lowest loss. If the
    configured setting diverged, any branch that did not is better.
    """
    diverged = not math.isfinite(branches[0].eval_loss)
    better = [
        number
        for number, branch in enumerate(branches)
        if branch.is_better or (diverged and math.isfinite(branch.eval_loss))
    ]
    return min(better, key=lambda number: branches[number].eval_loss, default=0)


def write_probe(path: Path, probe: Probe) -> None:
    """Write probe.json. Raises RunDirectoryError."""
    branches = [
        as_json(replace(branch, difference=None))
        | {"difference": branch.difference and asdict(branch.difference)}
        for branch in probe.branches
    ]
    derived = {"chosen": probe.chosen, "cost_tokens": probe.cost_tokens, "verdict": probe.verdict}
    write_json(
        path, {"schema": 1, **as_json(replace(probe, branches=())), "branches": branches, **derived}
    )
