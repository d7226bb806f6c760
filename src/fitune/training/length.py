"""How long a run is, in epochs, steps or tokens."""

import math
from dataclasses import dataclass

from fitune.config import TrainConfig
from fitune.data.batches import Epochs, num_steps
from fitune.data.examples import Examples
from fitune.errors import ConfigError

EVALS_PER_RUN = 10
#: An evaluation and a save after every other step would take most of the time of a run of 20 steps.
LEAST_STEPS_BETWEEN_EVALS = 5


@dataclass(frozen=True)
class Length:
    """The length of a run. One of `epochs`, `steps` and `tokens` limits it, the others are None."""

    epochs: float | None
    steps: int | None
    tokens: int | None
    #: estimates, except of what limits the run
    total_tokens: int
    total_steps: int

    def progress(self, *, step: int, tokens: int) -> float:
        """Return which fraction of the run is done, from 0 to 1."""
        done = step / self.steps if self.steps is not None else tokens / self.total_tokens
        return min(done, 1.0)

    def is_over(self, *, step: int, tokens: int) -> bool:
        return (self.steps is not None and step >= self.steps) or (
            self.tokens is not None and tokens >= self.tokens
        )


def run_length(train: TrainConfig, examples: Examples, *, rows_per_step: int) -> Length:
    """Return the configured length, which is one epoch by default.

    Raises ConfigError if that is less than one sample.
    """
    epoch_tokens = int((examples.lengths * examples.repeats.astype("float64")).sum())
    epoch_steps = num_steps(examples, rows_per_step=rows_per_step)
    if train.steps is not None:
        total_tokens = epoch_tokens * train.steps // max(epoch_steps, 1)
        return Length(None, train.steps, None, total_tokens, train.steps)
    if train.tokens is not None:
        total_steps = -(-train.tokens * epoch_steps // max(epoch_tokens, 1))
        return Length(None, None, train.tokens, train.tokens, total_steps)
    epochs = train.epochs or 1.0
    lengths = Epochs.of(examples.repeats)
    samples = lengths.num_samples(epochs)
    if not samples:
        mean = float(lengths.mean_samples)
        raise ConfigError(
            [
                f"train.epochs {epochs:g} of {mean:g} samples an epoch is not one sample: set it to "
                f"{math.ceil(100 / mean) / 100:g} or more, or give train.steps"
            ]
        )
    steps = num_steps(examples, rows_per_step=rows_per_step, epochs=epochs)
    total_tokens = max(round(epoch_tokens * samples / lengths.mean_samples), 1)
    return Length(epochs, None, None, total_tokens, steps)


def steps_between_evals(total_steps: int) -> int:
    """Return the steps between two evaluations of a run for which none are configured.

    A run of fewer than ten steps is evaluated half-way.
    """
    least = min(LEAST_STEPS_BETWEEN_EVALS, -(-total_steps // 2))
    return max(least, total_steps // EVALS_PER_RUN, 1)
