"""Turns a plan into what the page shows of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fitune.config import Loss, Recompute
from fitune.language import say, translated
from fitune.planning.choices import Choice
from fitune.planning.plan import Candidate, Plan, closest, does_not_fit, plan_json, split_of
from fitune.planning.plan_text import (
    about_seconds,
    changes_of,
    fits_text,
    highlighted_settings,
    predicted_rate,
    shown_assumptions,
)
from fitune.units import format_count, format_gib, format_seconds


class Held(BaseModel):
    """A candidate that is held while other settings change: what a plan chooses."""

    model_config = ConfigDict(extra="forbid")

    #: of the longest length, in a micro-batch
    samples: Annotated[int, Field(ge=1, le=10**6)]
    recompute: Recompute
    loss: Loss
    offloads: bool

    @property
    def choice(self) -> Choice:
        """The setting for `choose_plan`."""
        return Choice(
            micro_rows=self.samples,
            micro_tokens=None,
            recompute=self.recompute,
            loss=self.loss,
            offloads=self.offloads,
        )


def held(candidate: Candidate) -> Held:
    """Return what is held of a candidate."""
    return Held.model_validate(
        {
            "samples": candidate.micro_batch,
            "recompute": candidate.recompute,
            "loss": candidate.loss,
            "offloads": candidate.offload_activations,
        }
    )


def plan_answer(plan: Plan, settings: Sequence[Sequence[str]]) -> dict[str, object]:
    """Return the plan as JSON values, with its sentences in the language of `choose_language`.

    settings: for each candidate what `settings_of_candidate` returns.

    'plan' holds the numbers, as `fitune plan --format json` prints them; 'shown' is the number of
    the candidate whose memory is drawn: the chosen one, else the one that needs the least.
    """
    labels = highlighted_settings(plan)
    shown = shown_candidate(plan)
    return {
        "plan": plan_json(plan),
        "limit_bytes": plan.limit_bytes,
        "shown": shown,
        "parameters": format_count(plan.model.num_parameters),
        "trained": format_count(plan.model.num_trainable_parameters),
        "reason": translated(does_not_fit(plan)) if plan.chosen is None else "",
        "length": _length(plan, plan.candidates[shown]),
        "rows": [
            _row(plan, candidate, settings[number])
            | {"number": number, "label": labels.get(number, "")}
            for number, candidate in enumerate(plan.candidates)
        ],
        "notes": list(shown_assumptions(plan)),
        "others": [asdict(other) | {"quantity": say(other.quantity)} for other in plan.others],
    }


def shown_candidate(plan: Plan) -> int:
    """Return the number of the chosen candidate, else of the one that needs the least memory."""
    return plan.candidates.index(closest(plan)) if plan.chosen is None else plan.chosen


def _row(plan: Plan, candidate: Candidate, settings: Sequence[str]) -> dict[str, object]:
    left = plan.limit_bytes - candidate.predicted_device_bytes
    rate = predicted_rate(plan, candidate)
    seconds = candidate.predicted_seconds_per_step
    return {
        "split": split_of(plan, candidate).product,
        "sentence": split_of(plan, candidate).sentence,
        "changes": changes_of(plan, candidate),
        "fits": fits_text(candidate, left),
        "reason": _reason(candidate, missing_bytes=-left),
        "rate": format_count(rate),
        "step": format_seconds(seconds),
        "result": say(candidate.result),
        "phase": say(candidate.peak_phase),
        "settings": dict(each.split("=", 1) for each in settings),
        "held": held(candidate).model_dump(),
    }


def _reason(candidate: Candidate, *, missing_bytes: int) -> str:
    """Return the largest class of memory where that is too much, else what the plan says."""
    if missing_bytes <= 0:
        return translated(candidate.reason)
    largest = max(candidate.categories, key=lambda name: candidate.categories[name])
    size = format_gib(candidate.categories[largest], 1)
    return say("{name} {size} GiB", name=say(largest), size=size)


def _length(plan: Plan, candidate: Candidate) -> Mapping[str, object] | None:
    """Return how long the whole run takes; None where its length or its speed is not known."""
    length, seconds = plan.training.length, candidate.predicted_seconds_per_step
    if length is None or seconds is None:
        return None
    return {"steps": length.steps, "time": about_seconds(seconds * length.steps)}
