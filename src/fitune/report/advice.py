"""What to change in a run, best first, each with what it rests on.

The evidence is what was recorded: other runs beside this one, the candidates and categories of its plan, its
evaluations, its gradients, its noise, its events. A rule that lacks its evidence says nothing. Whether to change is
told by the validation, what to change by the noise; the rules are those of docs/batch_size.md.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fitune.language import say
from fitune.report.compare import ComparedRun, Comparison, eval_interval, last_split, peak_lr, planned_candidate
from fitune.report.run_on_disk import RecordedRun
from fitune.run.interval import ConfidenceInterval
from fitune.units import format_bytes

Effect = Literal["same", "close", "different"]
FEW_STEPS = 100
FLAT_FRACTION = 0.005
"""A loss that moved less over the second half of its run is flat."""
TIGHT_FRACTION = 0.93
LARGE_SHARE = 0.15
_LEAST_GAIN_FRACTION = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change. urgency: 2 the run is broken, 1 it wastes what it could have, 0 if it is needed. bytes_saved and
    speed_fraction (0.1: ten per cent faster): None where unknown. effect: on the training result. command: what to add
    to the run's configuration, '' where there is nothing to type."""

    change: str
    effect_on_result: Effect
    evidence: str
    command: str = ""
    bytes_saved: int | None = None
    speed_fraction: float | None = None
    urgency: int = 1

    @property
    def memory(self) -> str:
        if self.bytes_saved is None:
            return "n/a"
        return f"{'-' if self.bytes_saved >= 0 else '+'}{format_bytes(abs(self.bytes_saved))}"

    @property
    def speed(self) -> str:
        return "n/a" if self.speed_fraction is None else f"{self.speed_fraction:+.0%}".replace("-0%", "+0%")

    @property
    def effect(self) -> str:
        names = {"same": say("same"), "close": say("close"), "different": say("different")}
        return names[self.effect_on_result]


def advise(run: RecordedRun, comparison: Comparison) -> list[Advice]:
    """comparison: of the runs that `run` stands among, itself included. The most urgent first, then what leaves the
    result the same, then what saves most."""
    row = next(row for row in comparison.rows if row.run is run or row.run.path == run.path)
    found = [
        *_broken(run),
        *_from_other_runs(row, comparison),
        *_memory(row),
        *_data(run),
        *_course(run),
    ]
    effects = ("same", "close", "different")
    return sorted(
        found, key=lambda each: (-each.urgency, effects.index(each.effect_on_result), -(each.bytes_saved or 0))
    )


def _command(run: RecordedRun, *changes: str) -> str:
    source = f"{run.path}/config.yaml" if run.origin == "fitune" else "CONFIG"
    return f"fitune train {source} run.name={run.name}-2 {' '.join(changes)}"


def _diverges(run: RecordedRun) -> bool:
    loss = run.train["loss"]
    finite = loss[np.isfinite(loss)]
    return len(loss) > 0 and bool(
        not np.isfinite(loss[-1]) or (len(finite) > 10 and finite[-5:].mean() > 1.5 * finite[0])
    )


def _broken(run: RecordedRun) -> Iterator[Advice]:
    loss, lr = run.train["loss"], peak_lr(run)
    if _diverges(run) and lr is not None:
        yield Advice(
            change=say("halve the rate: {old} to {new}", old=f"{lr:.2g}", new=f"{lr / 2:.2g}"),
            effect_on_result="different",
            evidence=say("the loss diverges: {last} at the last step", last=f"{loss[-1]:.3g}"),
            command=_command(run, f"optim.lr={lr / 2:.2g}"),
            urgency=2,
        )
    num_ooms = run.summary.get("num_ooms") or 0
    micro, _ = last_split(run)
    if num_ooms and micro is not None and micro > 1:
        yield Advice(
            change=say("micro-batches of {new} samples instead of {old}", new=micro // 2, old=micro),
            effect_on_result="same",
            evidence=say("{num} times out of memory", num=num_ooms),
            command=_command(run, *_split_keys(run, micro // 2)),
            urgency=2,
        )


def _split_keys(run: RecordedRun, micro: int) -> list[str]:
    """The same rows a step in micro-batches of `micro`."""
    effective = run.summary.get("effective_batch")
    keys = [f"batch.micro={micro}"]
    if isinstance(effective, int):
        keys += [f"batch.effective={effective}", "batch.accumulation=auto"]
    return keys


def _from_other_runs(row: ComparedRun, comparison: Comparison) -> Iterator[Advice]:
    others = {other.name: other for other in comparison.rows if other.name != row.name and other.run.num_steps}
    for check in comparison.checks:
        other = others.get(check.second if check.first == row.name else check.first)
        if row.name not in (check.first, check.second) or other is None or not check.same:
            continue
        saved = row.peak_bytes - other.peak_bytes if row.peak_bytes and other.peak_bytes else None
        gain = _gain(row, other)
        if (saved or 0) > _LEAST_GAIN_FRACTION * (row.peak_bytes or 1) or (gain or 0) > _LEAST_GAIN_FRACTION:
            micro, _ = last_split(other.run)
            evidence = say("run {name}: losses within {most}", name=other.name, most=f"{check.max_difference:.2g}")
            yield Advice(
                change=say("{new} instead of {old}", new=other.split, old=row.split),
                effect_on_result="same",
                evidence=evidence,
                command=_command(row.run, *_split_keys(row.run, micro)) if micro else "",
                bytes_saved=saved,
                speed_fraction=gain,
            )
    best = min(others.values(), key=lambda other: other.eval_loss or math.inf, default=None)
    if best is None:
        return
    interval = eval_interval(comparison, best.name, row.name)
    if interval is not None and interval.high < 0:
        yield _as_run(row, best, comparison, interval=interval)


def _as_run(row: ComparedRun, best: ComparedRun, comparison: Comparison, *, interval: ConfidenceInterval) -> Advice:
    index, other = (next(i for i, each in enumerate(comparison.rows) if each.name == name.name) for name in (row, best))
    changed = [
        f"{key}={values[other]}"
        for key, values in comparison.differing.items()
        if values[index] != values[other] and values[other] is not None and isinstance(values[other], str | int | float)
    ]
    return Advice(
        change=say("train as {name} was: {changes}", name=best.name, changes=" ".join(changed)[:100]),
        effect_on_result="different",
        evidence=say(
            "eval loss {change} (95 %: {low} to {high}) at equal tokens",
            change=f"{interval.mean:+.3f}",
            low=f"{interval.low:+.3f}",
            high=f"{interval.high:+.3f}",
        ),
        command=_command(row.run, *changed),
        bytes_saved=row.peak_bytes - best.peak_bytes if row.peak_bytes and best.peak_bytes else None,
        speed_fraction=_gain(row, best),
    )


def _gain(row: ComparedRun, other: ComparedRun) -> float | None:
    if not row.tokens_per_second or not other.tokens_per_second:
        return None
    return other.tokens_per_second / row.tokens_per_second - 1


def _memory(row: ComparedRun) -> Iterator[Advice]:
    """From the plan: what the parts of the peak are, and what other settings would take."""
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
            evidence=say("the optimizer's state is {share} of the peak", share=f"{state / total:.0%}"),
            command=_command(run, "optim.name=adamw_8bit"),
            bytes_saved=round(state * 0.74),  # two states of 4 bytes become 1 byte and a scale for each 256 values
            urgency=1 if tight else 0,
        )
    fixed = sum(categories.get(name, 0) for name in ("gradient", "optimizer_state"))
    if fixed > 0.5 * total and candidate.get("method") == "full" and tight:
        yield Advice(
            change=say("LoRA instead of all weights"),
            effect_on_result="different",
            evidence=say("gradients and optimizer are {share} of the peak", share=f"{fixed / total:.0%}"),
            command=_command(run, "model.method=lora", "optim.lr=2e-4"),
            bytes_saved=round(fixed * 0.95),
            urgency=0,
        )


def _candidates(run: RecordedRun, chosen: Mapping[str, Any], *, tight: bool) -> Iterator[Advice]:
    """The plan's other settings that fit: those that are faster, and where it is tight the next smaller one."""
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
        yield _as_planned(run, chosen, max(smaller, key=lambda each: int(each["predicted_device_bytes"])), urgency=1)


def _as_planned(run: RecordedRun, chosen: Mapping[str, Any], other: Mapping[str, Any], *, urgency: int) -> Advice:
    keys = {"offload_activations": "model.offload_activations", "optimizer": "optim.name"}
    changed = {key: value for name, key in keys.items() if (value := other.get(name)) != chosen.get(name)}
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
        command=_command(
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


def _time_gain(chosen: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    before, after = chosen.get("predicted_seconds_per_step"), other.get("predicted_seconds_per_step")
    return before / after - 1 if before and after else None


def _data(run: RecordedRun) -> Iterator[Advice]:
    padding = ((run.data or {}).get("train") or {}).get("padding") or {}
    waste = padding.get("shuffled")
    if run.settings.get("data.packing") is False and isinstance(waste, int | float) and waste > 1.1:
        yield Advice(
            change=say("pack samples instead of padding them"),
            effect_on_result="same",
            evidence=say("{waste} tokens, padding included, are computed for each real one", waste=f"{waste:.2f}"),
            command=_command(run, "data.packing=true"),
            speed_fraction=waste - 1,
        )


def _course(run: RecordedRun) -> Iterator[Advice]:
    """What the losses, the gradient and the length say together, so that no two of them pull against each other: one
    that overfits is not made longer, and rows are not both added and taken away."""
    if _diverges(run):  # nothing else can be told of it
        return
    stop = _overfitting(run)
    if stop is not None:
        yield stop
    else:
        yield from _at_the_floor(run)
    if _is_clipped(run):
        yield from _clipping(run, may_grow=stop is None)
    if stop is None:
        yield from _length(run)


def _overfitting(run: RecordedRun) -> Advice | None:
    trends = _trends(run)
    if trends is None:
        return None
    (val, fit), evals = trends, run.evals["eval_loss"]
    best = int(np.nanargmin(evals))
    if not (val > FLAT_FRACTION and fit < 0 and best < len(evals) - 1):
        return None
    return Advice(
        change=say("stop at step {step}: best/ has these weights", step=f"{run.evals['step'][best]:,.0f}"),
        effect_on_result="different",
        evidence=say(
            "eval loss rises from {low} to {last} while training loss falls: it overfits, and no batch helps that",
            low=f"{evals[best]:.3f}",
            last=f"{evals[-1]:.3f}",
        ),
        command=_command(run, f"train.steps={run.evals['step'][best]:.0f}"),
    )


def _trends(run: RecordedRun) -> tuple[float, float] | None:
    """(of the eval loss, of the training loss), None where there are too few of either."""
    evals, train = run.evals["eval_loss"], run.train["loss"]
    if np.isfinite(evals).sum() < 4 or np.isfinite(train).sum() < 8:
        return None
    return _trend(evals), _trend(train)


def _clipping(run: RecordedRun, *, may_grow: bool) -> Iterator[Advice]:
    """A larger batch shortens the gradient where noise makes it long, if enough steps are left of the run."""
    lr, ratio, clipped = peak_lr(run), _noise_ratio(run), _clipped_fraction(run)
    if lr is None or clipped is None:
        return
    new = f"{lr / 2:.2g}"
    is_noise = may_grow and _may_double(run) and ratio is not None and ratio > 1
    yield Advice(
        change=say("a lower rate: {new}, or twice the samples at the same rate", new=new)
        if is_noise
        else say("a lower rate: {new}", new=new),
        effect_on_result="different",
        evidence=say("{share} of the steps were clipped", share=f"{clipped:.0%}"),
        command=_command(run, f"optim.lr={new}"),
        urgency=0,
    )


def _may_double(run: RecordedRun) -> bool:
    """Whether half as many steps are still enough."""
    return run.num_steps >= 2 * FEW_STEPS


def _at_the_floor(run: RecordedRun) -> Iterator[Advice]:
    trends, lr, ratio = _trends(run), peak_lr(run), _noise_ratio(run)
    if trends is None or max(map(abs, trends)) > FLAT_FRACTION or ratio is None or lr is None:
        return
    if ratio > 1:
        effective = run.summary.get("effective_batch") if _may_double(run) else None
        yield Advice(
            change=say("let the rate fall, or take twice the samples a step at the same rate")
            if effective
            else say("let the rate fall"),
            effect_on_result="different",
            evidence=say("both losses are flat and the gradient is noisy (rho {ratio})", ratio=f"{ratio:.1f}"),
            command=_command(run, f"batch.effective={2 * effective}", "batch.accumulation=auto") if effective else "",
        )
    elif ratio < 0.5 and not _is_clipped(run):  # clipping would take the higher rate back
        yield Advice(
            change=say("a higher rate: {new}, or stop; more accumulation will not help", new=f"{2 * lr:.2g}"),
            effect_on_result="different",
            evidence=say("both losses are flat and the gradient is not noisy (rho {ratio})", ratio=f"{ratio:.1f}"),
            command=_command(run, f"optim.lr={2 * lr:.2g}"),
        )


def _trend(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The change over the second half, as a share: of the means of its first and of its last part."""
    finite = values[np.isfinite(values)]
    half = finite[len(finite) // 2 :]
    part = max(len(half) // 3, 1)
    before, after = float(half[:part].mean()), float(half[-part:].mean())
    return after / before - 1 if before else 0.0


def _noise_ratio(run: RecordedRun) -> float | None:
    known = run.train["noise_ratio"][np.isfinite(run.train["noise_ratio"])]
    return float(known[-1]) if len(known) else None


def _clipped_fraction(run: RecordedRun) -> float | None:
    clip, norms = run.settings.get("optim.clip"), run.train["grad_norm"]
    norms = norms[np.isfinite(norms)]
    if not isinstance(clip, int | float) or clip <= 0 or not len(norms):
        return None
    return float((norms > clip).mean())


def _is_clipped(run: RecordedRun) -> bool:
    return (_clipped_fraction(run) or 0.0) > 0.5


def _length(run: RecordedRun) -> Iterator[Advice]:
    """Fewer rows make more steps, and each noisier: not where that is what the run suffers from."""
    effective = run.summary.get("effective_batch")
    if not (0 < run.num_steps < FEW_STEPS and run.state == "finished" and isinstance(effective, int) and effective > 4):
        return
    evidence = say(
        "only {num} optimizer steps: under {few} the rate's schedule hardly works", num=run.num_steps, few=FEW_STEPS
    )
    longer = _longer(run)
    if _is_clipped(run) or (_noise_ratio(run) or 0.0) > 1:
        change, changes = say("a longer run: {changes}", changes=longer), [longer]
        evidence = say("{evidence}; with fewer samples a step its gradient would be noisier", evidence=evidence)
    else:
        change = say("fewer samples a step ({new}), or a longer run: {changes}", new=effective // 2, changes=longer)
        changes = [f"batch.effective={effective // 2}", "batch.micro=auto", "batch.accumulation=auto"]
    yield Advice(
        change=change,
        effect_on_result="different",
        evidence=evidence,
        command=_command(run, *changes),
        urgency=0,
    )


def _longer(run: RecordedRun) -> str:
    """The key that makes it FEW_STEPS steps long, in the measure that it was given."""
    for key in ("train.steps", "train.tokens"):
        if isinstance(given := run.settings.get(key), int):
            return f"{key}={math.ceil(given * FEW_STEPS / run.num_steps)}"
    epochs = run.settings.get("train.epochs")
    before = epochs if isinstance(epochs, int | float) else 1
    return f"train.epochs={math.ceil(before * FEW_STEPS / run.num_steps)}"
