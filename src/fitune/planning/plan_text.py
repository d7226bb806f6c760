"""Says what a plan found, in sentences and cells of a table, for the command line and the board."""

import math
from collections.abc import Iterator

from fitune.language import say, translated
from fitune.planning.plan import SHOWN, Candidate, Plan, closest, split_of
from fitune.units import format_gib


def verdict(plan: Plan) -> str | None:
    """Return the answer of the plan in one line; None if nothing fits, which is an error."""
    if plan.chosen is None:
        return None
    chosen = plan.candidates[plan.chosen]
    words = {
        "split": split_of(plan, chosen).sentence,
        "needed": format_gib(chosen.predicted_device_bytes, 1),
        "limit": format_gib(plan.limit_bytes, 1),
    }
    per_step, length = chosen.predicted_seconds_per_step, plan.training.length
    if per_step is None or length is None:
        return say("{split}: {needed} of {limit} GiB", **words)
    return say(
        "{split}: {needed} of {limit} GiB, about {time}",
        **words,
        time=about_seconds(per_step * length.steps + (plan.training.reference_seconds or 0.0)),
    )


def highlighted_settings(plan: Plan) -> dict[int, str]:
    """Return {number: label} of the candidates that answer the most frequent questions.

    They are the configured candidate, the fastest that fits, the one with the least memory and one
    in between. If nothing fits, they are the closest one and those that change the result.
    """
    found: dict[int, list[str]] = {}

    def call(number: int, name: str) -> None:
        found.setdefault(number, []).append(say(name))

    if plan.configured is not None:
        call(plan.configured, "yours")
    if plan.chosen is None:
        call(plan.candidates.index(closest(plan)), "closest")
        for number, candidate in enumerate(plan.candidates):
            if candidate.result != "same":
                call(number, "instead")
    else:
        call(plan.chosen, "fastest")
        between, leanest = _leaner(plan, plan.chosen)
        if between is not None:
            call(between, "between")
        if leanest is not None:
            call(leanest, "leanest")
    return {number: ", ".join(names) for number, names in found.items()}


def _leaner(plan: Plan, fastest: int) -> tuple[int | None, int | None]:
    """Return (a candidate about halfway in memory, the one with the least memory), by number.

    Considers candidates that fit and that need less memory than all faster ones.
    """
    sizes = [candidate.predicted_device_bytes for candidate in plan.candidates]
    least, front = sizes[fastest], []
    for number, candidate in enumerate(plan.candidates):
        if candidate.result == "same" and candidate.fits and sizes[number] < least:
            least = sizes[number]
            front.append(number)
    if not front:
        return None, None
    *others, leanest = front
    halfway = math.sqrt(sizes[fastest] * sizes[leanest])
    return min(
        others, key=lambda number: abs(math.log(sizes[number] / halfway)), default=None
    ), leanest


def predicted_rate(plan: Plan, candidate: Candidate) -> float | None:
    seconds = candidate.predicted_seconds_per_step
    return None if seconds is None else float(plan.data["tokens_per_step"]) / seconds


def about_seconds(seconds: float) -> str:
    """Format a predicted time in its largest unit: '3 hours', '40 minutes', '20 seconds'.

    A prediction is not more precise than that.
    """
    for size, unit in (
        (86400, "{number} days"),
        (3600, "{number} hours"),
        (60, "{number} minutes"),
    ):
        if seconds >= 1.5 * size:
            return say(unit, number=f"{seconds / size:.0f}")
    return say("{number} seconds", number=f"{seconds:.0f}") if seconds >= 1.5 else say("a second")


def changes_of(plan: Plan, candidate: Candidate) -> list[str]:
    """Return the gradient checkpointing, and what else differs from the first candidate."""
    changes = [candidate.recompute, *(["offload"] if candidate.offload_activations else [])]
    reference = plan.candidates[0]
    both = len({each.loss for each in plan.candidates}) > 1
    changes += [say("full logits")] if candidate.loss == "full" and both else []
    return changes + [
        getattr(candidate, name)
        for name in ("optimizer", "method", "precision")
        if getattr(candidate, name) != getattr(reference, name)
    ]


def fits_text(candidate: Candidate, left_bytes: int) -> str:
    if candidate.fits:
        return say("yes, {left} left", left=format_gib(left_bytes, 1))
    if candidate.fits is None:
        return say("perhaps, at most +{more}", more=format_gib(-left_bytes, 1))
    return say("no, +{more}", more=format_gib(-left_bytes, 1))


def shown_assumptions(plan: Plan) -> Iterator[str]:
    """Yield the assumptions that everybody should read; the plan's JSON has all."""
    yield from map(translated, plan.assumptions[: 1 if plan.data["gpus"] == 1 else 2])
    yield from (translated(line) for line in plan.assumptions if line.startswith(SHOWN))
