"""Advises what to change in a run, with the evidence for every change.

The evidence is what was recorded: other runs that are compared with this one, the candidates and
memory categories of its plan, its evaluations, gradients, gradient noise and events. A rule without
evidence gives no advice. The eval loss decides whether to change the batch or the rate, and the
gradient noise decides how; these rules are those of docs/batch_size.md.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fitune.language import say
from fitune.report.advice_on_training import advise_on_training
from fitune.report.compare import ComparedRun, Comparison, eval_interval
from fitune.report.run_figures import last_split, peak_lr, planned_candidate
from fitune.report.run_on_disk import RecordedRun
from fitune.report.suggestion import Advice, command_for, diverges
from fitune.run.interval import ConfidenceInterval

#: a peak above this fraction of the budget is tight
TIGHT_FRACTION = 0.93
#: an optimizer state above this fraction of the peak is large
LARGE_SHARE = 0.15
#: a smaller gain in memory or speed is not worth a change
_LEAST_GAIN_FRACTION = 0.03


def advise(run: RecordedRun, comparison: Comparison) -> list[Advice]:
    """Return advice on the run: the most urgent first, then what does not change the result.

    Among equals, what saves most memory is first.
    comparison: a comparison of this run with others; it must contain the run itself.
    """
    row = next(row for row in comparison.rows if row.run is run or row.run.path == run.path)
    found = [
        *_broken(run),
        *_from_other_runs(row, comparison),
        *_memory(row),
        *_data(run),
        *advise_on_training(run),
    ]
    effects = ("same", "close", "different")
    return sorted(
        found,
        key=lambda each: (
            -each.urgency,
            effects.index(each.effect_on_result),
            -(each.bytes_saved or 0),
        ),
    )


def _broken(run: RecordedRun) -> Iterator[Advice]:
    """Advise on a run that diverges or runs out of memory."""
    loss, lr = run.train["loss"], peak_lr(run)
    if diverges(run) and lr is not None:
        yield Advice(
            change=say("halve the rate: {old} to {new}", old=f"{lr:.2g}", new=f"{lr / 2:.2g}"),
            effect_on_result="different",
            evidence=say("the loss diverges: {last} at the last step", last=f"{loss[-1]:.3g}"),
            command=command_for(run, f"optim.lr={lr / 2:.2g}"),
            urgency=2,
        )
    num_ooms = run.summary.get("num_ooms") or 0
    micro, _ = last_split(run)
    if num_ooms and micro is not None and micro > 1:
        yield Advice(
            change=say(
                "micro-batches of {new} samples instead of {old}", new=micro // 2, old=micro
            ),
            effect_on_result="same",
            evidence=say("{num} times out of memory", num=num_ooms),
            command=command_for(run, *_split_keys(run, micro // 2)),
            urgency=2,
        )


def _split_keys(run: RecordedRun, micro: int) -> list[str]:
    """Return the overrides for micro-batches of `micro` samples with the same effective batch."""
    effective = run.summary.get("effective_batch")
    keys = [f"batch.micro={micro}"]
    if isinstance(effective, int):
        keys += [f"batch.effective={effective}", "batch.accumulation=auto"]
    return keys


def _from_other_runs(row: ComparedRun, comparison: Comparison) -> Iterator[Advice]:
    """Advise to train as another run of the comparison that was cheaper or better."""
    others = {
        other.name: other
        for other in comparison.rows
        if other.name != row.name and other.run.num_steps
    }
    for check in comparison.checks:
        other = others.get(check.second if check.first == row.name else check.first)
        if row.name not in (check.first, check.second) or other is None or not check.same:
            continue
        saved = row.peak_bytes - other.peak_bytes if row.peak_bytes and other.peak_bytes else None
        gain = _gain(row, other)
        saves_memory = (saved or 0) > _LEAST_GAIN_FRACTION * (row.peak_bytes or 1)
        if saves_memory or (gain or 0) > _LEAST_GAIN_FRACTION:
            micro, _ = last_split(other.run)
            evidence = say(
                "run {name}: losses within {most}",
                name=other.name,
                most=f"{check.max_difference:.2g}",
            )
            yield Advice(
                change=say("{new} instead of {old}", new=other.split, old=row.split),
                effect_on_result="same",
                evidence=evidence,
                command=command_for(row.run, *_split_keys(row.run, micro)) if micro else "",
                bytes_saved=saved,
                speed_fraction=gain,
            )
    best = min(others.values(), key=lambda other: other.eval_loss or math.inf, default=None)
    if best is None:
        return
    interval = eval_interval(comparison, best.name, row.name)
    if interval is not None and interval.high < 0:
        yield _as_run(row, best, comparison, interval=interval)


def _as_run(
    row: ComparedRun, best: ComparedRun, comparison: Comparison, *, interval: ConfidenceInterval
) -> Advice:
    """Advise to train with the settings of a better run.

    interval: the difference of the eval losses, best - this one.
    """
    index, other = (
        next(i for i, each in enumerate(comparison.rows) if each.name == name.name)
        for name in (row, best)
    )
    changed = [
        f"{key}={values[other]}"
        for key, values in comparison.differing.items()
        if values[index] != values[other]
        and values[other] is not None
        and isinstance(values[other], str | int | float)
    ]
    saved = row.peak_bytes - best.peak_bytes if row.peak_bytes and best.peak_bytes else None
    return Advice(
        change=say(
            "train as {name} was: {changes}", name=best.name, changes=" ".join(changed)[:100]
        ),
        effect_on_result="different",
        evidence=say(
            "eval loss {change} (95 %: {low} to {high}) at equal tokens",
            change=f"{interval.mean:+.3f}",
            low=f"{interval.low:+.3f}",
            high=f"{interval.high:+.3f}",
        ),
        command=command_for(row.run, *changed),
        bytes_saved=saved,
        speed_fraction=_gain(row, best),
    )


def _gain(row: ComparedRun, other: ComparedRun) -> float | None:
    """Return how much faster the other run was: 0.1 for ten per cent."""
    if not row.tokens_per_second or not other.tokens_per_second:
        return None
    return other.tokens_per_second / row.tokens_per_second - 1


def _memory(row: ComparedRun) -> Iterator[Advice]:
    """Advise from the run's plan: from the categories of its peak and from its other candidates."""
    run, candidate = row.run, planned_candidate(row.run)
    if candidate is None:
        return
    budget = (run.plan or {}).get("budget_bytes")
    peak = candidate.get("predicted_device_bytes") or row.peak_bytes
    tight = isinstance(budget, int) and isinstance(peak, int) and peak > TIGHT_FRACTION * budget
    yield from _candidates(run, candidate, tight=tight)
    categories: Mapping[str, int] = candidate.get("categories") or {}
    total = sum(categories.values()) or 1
    state = categories.get("optimizer_state", 0)
    if state > LARGE_SHARE * total and candidate.get("optimizer") in ("adamw", "adamw_foreach"):
        yield Advice(
            change=say("8-bit AdamW"),
            effect_on_result="close",
            evidence=say(
                "the optimizer's state is {share} of the peak", share=f"{state / total:.0%}"
            ),
            command=command_for(run, "optim.name=adamw_8bit"),
            # two states of 4 bytes each become 1 byte each, with a scale for every 256 values
            bytes_saved=round(state * 0.74),
            urgency=1 if tight else 0,
        )
    fixed = sum(categories.get(name, 0) for name in ("gradient", "optimizer_state"))
    if fixed > 0.5 * total and candidate.get("method") == "full" and tight:
        yield Advice(
            change=say("LoRA instead of all weights"),
            effect_on_result="different",
            evidence=say(
                "gradients and optimizer are {share} of the peak", share=f"{fixed / total:.0%}"
            ),
            command=command_for(run, "model.method=lora", "optim.lr=2e-4"),
            bytes_saved=round(fixed * 0.95),
            urgency=0,
        )


def _candidates(run: RecordedRun, chosen: Mapping[str, object], *, tight: bool) -> Iterator[Advice]:
    """Advise the plan's fastest other candidate, and the next smaller one if memory is tight.

    Only candidates that fit and do not change the result are considered.
    """
    size = chosen.get("predicted_device_bytes")
    others = [
        each
        for each in (run.plan or {}).get("candidates") or []
        if each != chosen and each.get("fits") and each.get("result", "same") == "same"
    ]
    if not isinstance(size, int):
        return
    smaller = [each for each in others if each["predicted_device_bytes"] < size]
    faster = [each for each in others if (_time_gain(chosen, each) or 0) > _LEAST_GAIN_FRACTION]
    if faster:
        best = max(faster, key=lambda each: _time_gain(chosen, each) or 0)
        yield _as_planned(run, chosen, best, urgency=1)
    if smaller and tight:
        yield _as_planned(
            run,
            chosen,
            max(smaller, key=lambda each: int(each["predicted_device_bytes"])),
            urgency=1,
        )


def _as_planned(
    run: RecordedRun, chosen: Mapping[str, Any], other: Mapping[str, Any], *, urgency: int
) -> Advice:
    keys = {"offload_activations": "model.offload_activations", "optimizer": "optim.name"}
    changed = {
        key: value for name, key in keys.items() if (value := other.get(name)) != chosen.get(name)
    }
    settings = [f"{key}={str(value).lower()}" for key, value in changed.items()]
    change = say(
        "{micro} x {accumulation}, gradient checkpointing {recompute}",
        micro=other["micro_batch"],
        accumulation=other["accumulation"],
        recompute=other["recompute"],
    )
    return Advice(
        change=", ".join([change, *settings]),
        effect_on_result="same",
        evidence=say("the plan's prediction"),
        command=command_for(
            run,
            f"batch.micro={other['micro_batch']}",
            f"batch.accumulation={other['accumulation']}",
            f"model.recompute={other['recompute']}",
            *settings,
        ),
        bytes_saved=int(chosen["predicted_device_bytes"]) - int(other["predicted_device_bytes"]),
        speed_fraction=_time_gain(chosen, other),
        urgency=urgency,
    )


def _time_gain(chosen: Mapping[str, object], other: Mapping[str, Any]) -> float | None:
    """Return how much faster the other candidate is predicted to be: 0.1 for ten per cent."""
    before = chosen.get("predicted_seconds_per_step")
    after = other.get("predicted_seconds_per_step")
    return before / after - 1 if before and after else None


def _data(run: RecordedRun) -> Iterator[Advice]:
    """Advise to pack samples if much padding is computed."""
    padding = ((run.data or {}).get("train") or {}).get("padding") or {}
    waste = padding.get("shuffled")
    if run.settings.get("data.packing") is False and isinstance(waste, int | float) and waste > 1.1:
        yield Advice(
            change=say("pack samples instead of padding them"),
            effect_on_result="same",
            evidence=say(
                "{waste} tokens, padding included, are computed for each real one",
                waste=f"{waste:.2f}",
            ),
            command=command_for(run, "data.packing=true"),
            speed_fraction=waste - 1,
        )
