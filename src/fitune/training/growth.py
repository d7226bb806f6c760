"""Averages a run's gradient noise, and enlarges its effective batch as train.batch_mode decides."""

from dataclasses import replace

from fitune.batch_size.growth import (
    Change,
    Situation,
    changed,
    decide,
    is_flat,
    rescale_memory,
    set_settings,
    switch_settings,
)
from fitune.batch_size.noise import (
    FEWEST_HALF_LIFE_STEPS,
    HALF_LIFE_FRACTION,
    estimate,
    observe,
    observe_preconditioned,
)
from fitune.batch_size.scaling import OptimSettings
from fitune.config import RunConfig
from fitune.step.assemble import Setup
from fitune.step.schedule import lr_factor
from fitune.step.step import StepResult
from fitune.training.length import Length
from fitune.training.state import RunState


class BatchGrowth:
    """The effective batch of a run, and the optimizer's settings that depend on it.

    supervised_fraction: which fraction of the run's tokens is supervised.
    """

    def __init__(
        self, config: RunConfig, setup: Setup, *, length: Length, supervised_fraction: float
    ) -> None:
        self._config, self._setup, self._length = config, setup, length
        self._supervised_tokens = max(length.total_tokens * supervised_fraction, 1.0)

    def num_samples(self, state: RunState) -> int:
        """Return the size of the effective batch."""
        return self._config.batch.rows_per_step * state.batch.growth

    def optim(self, state: RunState) -> OptimSettings:
        return state.batch.optim or self._setup.optim

    def with_noise(self, state: RunState, result: StepResult) -> RunState:
        """Return the state with its averages of the gradient noise updated by a step."""
        if result.norms is None or not result.updated:
            return state
        half_life, optim = self._half_life_tokens(state), self.optim(state)
        noise = observe(
            state.noise,
            result.norms,
            half_life_tokens=half_life,
            beta1=optim.betas[0],
            clip=optim.clip,
        )
        preconditioned = observe_preconditioned(
            state.preconditioned_noise, result.norms, half_life_tokens=half_life
        )
        return replace(state, noise=noise, preconditioned_noise=preconditioned)

    def decide(self, state: RunState) -> tuple[Change, Situation] | None:
        """Return the change that is due and the situation that calls for it, or None."""
        progress = self._length.progress(step=state.step, tokens=state.tokens)
        now = Situation(
            tokens=progress * self._supervised_tokens,
            total_tokens=self._supervised_tokens,
            step_tokens=self._step_tokens(state),
            half_life_tokens=self._half_life_tokens(state),
            warmup_fraction=self._config.optim.warmup,
            schedule=lr_factor(self._config.optim, progress),
            noise=estimate(state.noise),
            flat=is_flat(state.eval_losses),
        )
        change = decide(self._config.train.batch_mode, state.batch, now)
        return None if change is None else (change, now)

    def apply(self, state: RunState, change: Change, now: Situation) -> RunState:
        """Change the optimizer's settings and moments, and return the state with the new batch."""
        optim = switch_settings(self.optim(state), change, steps_left=now.steps_left)
        rescale_memory(self._setup.optimizer, gain=change.gain)
        set_settings(self._setup.optimizer, optim)
        return replace(state, batch=changed(state.batch, now, optim), eval_losses=())

    def _step_tokens(self, state: RunState) -> float:
        """Return the mean number of supervised tokens in an effective batch."""
        configured = self._supervised_tokens / max(self._length.total_steps, 1)
        return configured * state.batch.growth

    def _half_life_tokens(self, state: RunState) -> float:
        """Return the half-life of the averages of the gradient noise."""
        return max(
            HALF_LIFE_FRACTION * self._supervised_tokens,
            FEWEST_HALF_LIFE_STEPS * self._step_tokens(state),
        )
