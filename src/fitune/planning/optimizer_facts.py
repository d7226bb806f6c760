"""Computes what a configuration means for the optimizer, in steps and in tokens.

Most of its settings are fractions of the run's length, which users do not have in mind when they
write them down.
"""

import math
from dataclasses import dataclass

from fitune.batch_size.scaling import OptimSettings, configured_lr, is_adaptive, settings_of
from fitune.config import OptimConfig, RunConfig, TrainConfig
from fitune.language import say
from fitune.optimizers.table import OPTIMIZERS
from fitune.planning.limits import Lengths
from fitune.step.schedule import lr_factor

#: the standard deviation with which most language models initialise their weights
WEIGHT_STD = 0.02
#: the bits of the mantissa
BFLOAT16_BITS = 7
#: the highest usual learning rate of AdamW and Adafactor: published runs of language models stay
#: below it; for plain SGD it is a hundred times as large
HIGHEST_USUAL_RATE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of the run: optimizer steps, and the tokens that they see."""

    steps: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTraining:
    """What the optimizer does over a run."""

    #: None where the run's length is not known
    length: Span | None
    #: the fraction of all tokens that are targets; None where the data is not known
    supervised_fraction: float | None
    schedule: str
    #: None where the run's length is not known
    warmup: Span | None
    optim: OptimSettings
    #: the time after which a gradient has half its weight in the averages of beta1 and beta2;
    #: empty for an optimizer without betas
    half_lives: tuple[Span, ...]
    #: what weight decay alone takes off a weight over the run; None where its length is not known
    shrink_fraction: float | None
    #: see `lost_updates_fraction`; None where what is trained is not in bfloat16
    lost_updates_fraction: float | None
    #: of the pass before the first step that computes a reference; None where there is none, and
    #: where its time is not predicted
    reference_seconds: float | None = None


def plan_training(config: RunConfig, lengths: Lengths, *, precision: str) -> PlannedTraining:
    """Compute what the configuration means for the optimizer.

    precision: the precision of the plan's chosen candidate.
    """
    rows = config.batch.rows_per_step
    optim = settings_of(
        config.optim,
        lr=configured_lr(config.optim, config.model.method, config.objective),
        rows=rows,
    )
    step_tokens = lengths.mean_tokens * rows

    def span(steps: float) -> Span:
        return Span(steps=steps, tokens=steps * step_tokens)

    steps = _num_steps(config.train, lengths, rows)
    has_betas = OPTIMIZERS[config.optim.name].has_betas
    shrink = None if steps is None else shrink_fraction(config.optim, optim, steps=steps)
    rounds_updates = (
        precision == "bfloat16" and config.model.method == "full"
    )  # adapters are float32
    return PlannedTraining(
        length=None if steps is None else span(steps),
        supervised_fraction=None if lengths.epoch_rows is None else lengths.supervised_fraction,
        schedule=config.optim.schedule,
        warmup=None if steps is None else span(config.optim.warmup * steps),
        optim=optim,
        half_lives=tuple(span(_half_life(beta)) for beta in (optim.betas if has_betas else ())),
        shrink_fraction=shrink,
        lost_updates_fraction=lost_updates_fraction(optim.lr) if rounds_updates else None,
    )


def unusual_rate(optim: OptimConfig) -> str | None:
    """Return a warning about a learning rate that is surely a mistake, such as 3 for 3e-5."""
    if optim.lr == "auto":
        return None
    highest = HIGHEST_USUAL_RATE * (1 if is_adaptive(optim) else 100)
    if optim.lr <= highest:
        return None
    return say(
        "optim.lr {rate} is far above the rates that {name} trains language models with (below {highest}): usual are "
        "2e-5 for full fine-tuning and 2e-4 for adapters",
        rate=f"{optim.lr:g}",
        name=optim.name,
        highest=f"{highest:g}",
    )


def shrink_fraction(optim: OptimConfig, settings: OptimSettings, *, steps: int) -> float:
    """Return the fraction that AdamW takes off a weight whose gradient is zero.

    It is 1 - exp(-sum over all steps of rate x decay).
    """
    samples = 1000
    mean_factor = (
        sum(lr_factor(optim, (number + 0.5) / samples) for number in range(samples)) / samples
    )
    return -math.expm1(-settings.lr * mean_factor * settings.weight_decay * steps)


def lost_updates_fraction(lr: float) -> float:
    """Return the fraction of updates of size `lr` that bfloat16 rounds away.

    An update is lost if half a unit in the last place of its weight exceeds it; the weights are
    taken to be normally distributed. Adam's updates are rarely larger than the rate, so at least
    this fraction is lost.
    """
    smallest = 2.0 ** (math.floor(math.log2(lr * 2 ** (BFLOAT16_BITS + 1))) + 1)
    return math.erfc(smallest / (WEIGHT_STD * math.sqrt(2)))


def _num_steps(train: TrainConfig, lengths: Lengths, rows: int) -> int | None:
    """Return the number of steps of `rows` samples; None if the data is not known."""
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / (lengths.mean_tokens * rows))
    if lengths.epoch_rows is None:
        return None
    return math.ceil((train.epochs or 1.0) * lengths.epoch_rows / rows)


def _half_life(beta: float) -> float:
    """Return the number of steps after which beta ** steps is one half."""
    return math.log(0.5) / math.log(beta) if beta else 0.0
