"""Describe the optimizer of a plan in steps and tokens, and warn of settings without effect."""

from collections.abc import Iterator

from fitune.language import say
from fitune.planning.optimizer_facts import PlannedTraining, Span
from fitune.units import format_count

TOO_FEW_STEPS, FEW_STEPS = 100, 1000
#: Weight decay has no visible effect if it shrinks a weight by less than this over the whole run.
MIN_DECAY_FRACTION = 0.005
#: A smaller share of updates lost to rounding is no reason to change the precision.
MIN_LOST_FRACTION = 0.01


def training_lines(training: PlannedTraining) -> Iterator[tuple[str, str]]:
    """Yield (title, line) for the heading of a plan."""
    optim, length, share, shrink = (
        training.optim, training.length, training.supervised_fraction, training.shrink_fraction
    )  # fmt: skip
    parts = [] if length is None else [_span(length)]
    parts += [] if share is None else [say("{share} supervised", share=f"{share:.0%}")]
    parts += [say("rate {lr}", lr=f"{optim.lr:.3g}"), training.schedule]
    parts += [] if training.warmup is None else [say("warm-up {span}", span=_span(training.warmup))]
    yield say("training"), " · ".join(parts)
    parts = [
        say(
            "beta{number} {beta} halves in {span}",
            number=number,
            beta=f"{beta:.4g}",
            span=_span(span),
        )
        for number, (beta, span) in enumerate(
            zip(optim.betas, training.half_lives, strict=False), start=1
        )
    ]
    decay = say("weight decay {decay}", decay=f"{optim.weight_decay:.3g}")
    parts.append(
        decay
        if shrink is None
        else say("{decay} takes {shrink} in all", decay=decay, shrink=f"{shrink:.2%}")
    )
    yield "", " · ".join([*parts, say("clip {clip}", clip=f"{optim.clip:.3g}")])


def training_warnings(training: PlannedTraining) -> Iterator[str]:
    """Yield a message for each setting of the optimizer that has no effect or does harm."""
    optim, length, shrink = training.optim, training.length, training.shrink_fraction
    if length is not None and length.steps < TOO_FEW_STEPS:
        yield say(
            "warning: only {steps} optimizer steps, under {few}: take fewer samples a step, or more epochs",
            steps=_count(length.steps),
            few=TOO_FEW_STEPS,
        )
    elif length is not None and length.steps < FEW_STEPS:
        yield say(
            "note: {steps} optimizer steps: with {few} or more a schedule has time to work",
            steps=_count(length.steps),
            few=f"{FEW_STEPS:,}",
        )
    if (training.lost_updates_fraction or 0.0) >= MIN_LOST_FRACTION:
        yield say(
            "warning: weights in bfloat16 lose at least {share} of the updates at a rate of {lr}: "
            "model.precision=autocast_bfloat16 keeps them",
            share=f"{training.lost_updates_fraction:.0%}",
            lr=f"{optim.lr:.3g}",
        )
    if optim.weight_decay and shrink is not None and shrink < MIN_DECAY_FRACTION:
        yield say(
            "note: weight decay {decay} is inert: it takes {shrink} off a weight in the whole run",
            decay=f"{optim.weight_decay:.3g}",
            shrink=f"{shrink:.2%}",
        )


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _span(span: Span) -> str:
    return say(
        "{steps} steps = {tokens} tokens",
        steps=_count(span.steps),
        tokens=format_count(round(span.tokens)),
    )
