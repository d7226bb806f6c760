"""Implement `fitune plan --splits 6x1,6x4,4x6`, which compares given splits of the batch.

It predicts memory and time of each split, and says what each means for the learning rate.
"""

import math
import re
from collections.abc import Iterator

from fitune.batch_size.scaling import (
    configured_lr,
    is_adaptive,
    rate_factor,
    scaling_note,
    settings_of,
)
from fitune.cli.output import console, print_json, table
from fitune.config import OptimConfig, RunConfig
from fitune.errors import UsageError
from fitune.language import say, translated
from fitune.planning.plan import Candidate, Plan, closest, plan_json
from fitune.planning.plan_text import fits_text, predicted_rate
from fitune.units import format_count, format_gib


def compare_splits(config: RunConfig, splits: str, output_format: str) -> None:
    """Print the comparison of splits. Raises UsageError if `splits` cannot be read."""
    from fitune.planning.search import choose_plan

    plans = [
        choose_plan(_force_split(config, *split), search="fastest") for split in read_splits(splits)
    ]
    if output_format == "json":
        print_json({"plans": [plan_json(plan) for plan in plans]})
        return
    screen = console(output_format)
    columns = (
        say("micro-batch x accumulation"),
        say("gradient checkpointing"),
        ">GiB",
        say("fits"),
        f">{say('tok/s')}",
    )
    screen.print(table(columns, [_row(plan) for plan in plans]))
    lr = configured_lr(config.optim, config.model.method, config.objective)
    for message in (
        *_equal_batch_notes(plans),
        *_rate_notes(plans, config.optim, lr),
    ):
        screen.print(message, soft_wrap=True)


def read_splits(text: str) -> list[tuple[int, int]]:
    """Parse '6x1,6x4' into [(micro-batch, accumulation), ...]: [(6, 1), (6, 4)]."""
    found = [re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*", part) for part in text.split(",")]
    pairs = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if len(pairs) < len(found) or any(0 in pair for pair in pairs):
        raise UsageError(
            f"--splits {text} is no list of micro-batch x accumulation: write it like 6x1,6x4,4x6"
        )
    return pairs


def _force_split(config: RunConfig, rows: int, accumulation: int) -> RunConfig:
    batch = {
        "effective": rows * accumulation,
        "micro": rows,
        "accumulation": "auto",
        "micro_tokens": "auto",
    }
    return config.model_copy(update={"batch": config.batch.model_copy(update=batch)})


def _shown(plan: Plan) -> Candidate:
    return closest(plan) if plan.chosen is None else plan.candidates[plan.chosen]


def _split_text(plan: Plan) -> str:
    candidate = _shown(plan)
    return f"{candidate.micro_batch} x {plan.data['effective_batch'] // candidate.micro_batch}"


def _row(plan: Plan) -> tuple[str, ...]:
    candidate = _shown(plan)
    left = plan.limit_bytes - candidate.predicted_device_bytes
    return (
        f"{_split_text(plan)} = {plan.data['effective_batch']}",
        ", ".join(candidate.techniques),
        format_gib(candidate.predicted_device_bytes, 1),
        fits_text(candidate, left),
        format_count(predicted_rate(plan, candidate)),
    )


def _equal_batch_notes(plans: list[Plan]) -> Iterator[str]:
    """Yield a note for splits of the same batch, which differ only in memory and time."""
    for batch in sorted({plan.data["effective_batch"] for plan in plans}):
        same = [plan for plan in plans if plan.data["effective_batch"] == batch]
        if len(same) > 1:
            best = min(
                same,
                key=lambda plan: (
                    not _shown(plan).fits,
                    _shown(plan).predicted_seconds_per_step or math.inf,
                ),
            )
            yield say(
                "{splits} are one training of {rows} samples a step and take one learning rate; of them, take {best}.",
                splits=", ".join(map(_split_text, same)),
                rows=batch,
                best=_split_text(best),
            )


def _rate_notes(plans: list[Plan], optim: OptimConfig, lr: float) -> Iterator[str]:
    """Yield the learning rate for each batch other than the one that the rate was chosen for.

    Another batch size is a different training and needs another rate (docs/batch_size.md).
    optim.scaling gives the rate if optim.reference_batch is set. Otherwise the batch of the first
    split is the reference.
    """
    reference = optim.reference_batch or plans[0].data["effective_batch"]
    for batch in sorted({plan.data["effective_batch"] for plan in plans} - {reference}):
        if optim.reference_batch is not None:
            note = scaling_note(optim, settings_of(optim, lr=lr, rows=batch), lr=lr, rows=batch)
            yield translated(note)
            continue
        change = batch / reference
        factor = rate_factor("sqrt_gain", change, rho=None, adaptive=is_adaptive(optim))
        values = {
            "rows": batch,
            "reference": reference,
            "factor": f"{factor:.2g}",
            "lr": f"{lr:.2g}",
            "scaled": f"{lr * factor:.2g}",
        }
        if change > 1 and is_adaptive(optim):
            yield say(
                "{rows} samples a step instead of {reference}: at most {factor} times the "
                "learning rate ({scaled} for {lr}), less where the gradient is not noisy; {whole} "
                "times is too much.",
                **values,
                whole=f"{change:.2g}",
            )
        else:
            yield say(
                "{rows} samples a step instead of {reference}: {factor} times the learning rate ({scaled} for {lr}).",
                **values,
            )
