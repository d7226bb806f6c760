"""What a configuration asks of the optimizer, in steps and in tokens: most of it is a share of a run's length, which
nobody has in mind when writing it down."""

import math
from dataclasses import dataclass

from fitune.batch_size.scaling import OptimSettings, configured_lr, is_adaptive, settings_of
from fitune.config import OptimConfig, RunConfig
from fitune.language import say
from fitune.optimizers.table import OPTIMIZERS
from fitune.planning.limits import Lengths
from fitune.step.schedule import lr_factor

WEIGHT_STD = 0.02
"""Of the weights of most language models, which are initialised so."""
BFLOAT16_BITS = 7
"""Of the mantissa."""


HIGHEST_USUAL_RATE = 0.01
"""Of AdamW and Adafactor; published runs of language models stay below it. Of plain SGD a hundred times as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of the run: optimizer steps, and the tokens that they see."""

    steps: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTraining:
    """length, warmup, shrink_fraction: None where the run's length is not known. supervised_fraction: of the tokens,
    None where the data is not known. half_lives: after which a gradient counts half in beta1's and beta2's average,
    empty for an optimizer without betas. shrink_fraction: of a weight, by weight decay alone, over the run.
    lost_updates_fraction: see the function; None where what is trained is not in bfloat16."""

    length: Span | None
    supervised_fraction: float | None
    schedule: str
    warmup: Span | None
    optim: OptimSettings
    half_lives: tuple[Span, ...]
    shrink_fraction: float | None
    lost_updates_fraction: float | None


def plan_training(config: RunConfig, lengths: Lengths, *, precision: str) -> PlannedTraining:
    """precision: of the candidate that is chosen."""
    rows = config.batch.rows_per_step
    optim = settings_of(config.optim, lr=configured_lr(config), rows=rows)
    step_tokens = lengths.mean_tokens * rows

    def span(steps: float) -> Span:
        return Span(steps=steps, tokens=steps * step_tokens)

    steps = _num_steps(config, lengths, step_tokens)
    has_betas = OPTIMIZERS[config.optim.name].has_betas
    rounds_updates = precision == "bfloat16" and config.model.method == "full"  # adapters are float32
    return PlannedTraining(
        length=None if steps is None else span(steps),
        supervised_fraction=None if lengths.epoch_rows is None else lengths.supervised_fraction,
        schedule=config.optim.schedule,
        warmup=None if steps is None else span(config.optim.warmup * steps),
        optim=optim,
        half_lives=tuple(span(_half_life(beta)) for beta in (optim.betas if has_betas else ())),
        shrink_fraction=None if steps is None else shrink_fraction(config.optim, optim, steps=steps),
        lost_updates_fraction=lost_updates_fraction(optim.lr) if rounds_updates else None,
    )


def unusual_rate(config: RunConfig) -> str | None:
    """A sentence about a learning rate that was surely not meant, such as 3 for 3e-5."""
    rate, highest = configured_lr(config), HIGHEST_USUAL_RATE * (1 if is_adaptive(config.optim) else 100)
    if rate <= highest:
        return None
    return say(
        "optim.lr {rate} is far above the rates that {name} trains language models with (below {highest}): usual are "
        "2e-5 for full fine-tuning and 2e-4 for adapters",
        rate=f"{rate:g}",
        name=config.optim.name,
        highest=f"{highest:g}",
    )


def shrink_fraction(optim: OptimConfig, settings: OptimSettings, *, steps: int) -> float:
    """1 - exp(-sum of rate x decay): what AdamW takes off a weight whose gradient is zero."""
    samples = 1000
    mean_factor = sum(lr_factor(optim, (number + 0.5) / samples) for number in range(samples)) / samples
    return -math.expm1(-settings.lr * mean_factor * settings.weight_decay * steps)


def lost_updates_fraction(lr: float) -> float:
    """The share of updates as large as the rate that bfloat16 rounds away: of normal weights, those so large that half
    a unit in the last place exceeds it. Adam's updates are rarely larger, so at least this share is lost."""
    smallest = 2.0 ** (math.floor(math.log2(lr * 2 ** (BFLOAT16_BITS + 1))) + 1)
    return math.erfc(smallest / (WEIGHT_STD * math.sqrt(2)))


def _num_steps(config: RunConfig, lengths: Lengths, step_tokens: float) -> int | None:
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / step_tokens)
    if lengths.epoch_rows is None:
        return None
    return math.ceil((train.epochs or 1.0) * lengths.epoch_rows / config.batch.rows_per_step)


def _half_life(beta: float) -> float:
    """In steps."""
    return math.log(0.5) / math.log(beta) if beta else 0.0
