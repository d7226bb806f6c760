"""Advises on the rate, the batch and the length of a run, from its losses and gradients."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from fitune.language import say
from fitune.report.run_figures import peak_lr
from fitune.report.run_on_disk import RecordedRun
from fitune.report.suggestion import Advice, command_for, diverges

#: with fewer optimizer steps the schedule of the learning rate hardly works
FEW_STEPS = 100
#: a loss that changed by less over the second half of the run is flat
FLAT_FRACTION = 0.005


def advise_on_training(run: RecordedRun) -> Iterator[Advice]:
    """Advise on the rate, the batch and the length of a run.

    The rules exclude each other where they would contradict: a run that overfits is not advised to
    be longer, and not both a larger and a smaller batch are advised.
    """
    # the curves of a run that diverges say nothing else
    if diverges(run):
        return
    stop = _overfitting(run)
    if stop is not None:
        yield stop
    else:
        yield from _at_the_floor(run)
    # at the start of a run most gradients are clipped at any useful rate
    if _is_clipped(run) and run.num_steps >= FEW_STEPS:
        yield from _clipping(run, may_grow=stop is None)
    if stop is None:
        yield from _length(run)


def _overfitting(run: RecordedRun) -> Advice | None:
    """Advise to stop at the lowest eval loss, if it rises later while the training loss falls."""
    trends = _trends(run)
    if trends is None:
        return None
    (val, fit), evals = trends, run.evals["eval_loss"]
    best = int(np.nanargmin(evals))
    if not (val > FLAT_FRACTION and fit < 0 and best < len(evals) - 1):
        return None
    return Advice(
        change=say(
            "stop at step {step}: best/ has these weights", step=f"{run.evals['step'][best]:,.0f}"
        ),
        effect_on_result="different",
        evidence=say(
            "eval loss rises from {low} to {last} while training loss falls: it overfits, and no batch helps that",
            low=f"{evals[best]:.3f}",
            last=f"{evals[-1]:.3f}",
        ),
        command=command_for(run, f"train.steps={run.evals['step'][best]:.0f}"),
    )


def _trends(run: RecordedRun) -> tuple[float, float] | None:
    """Return the `_trend` of the eval loss and of the training loss; None if one is too short."""
    evals, train = run.evals["eval_loss"], run.train["loss"]
    if np.isfinite(evals).sum() < 4 or np.isfinite(train).sum() < 8:
        return None
    return _trend(evals), _trend(train)


def _clipping(run: RecordedRun, *, may_grow: bool) -> Iterator[Advice]:
    """Advise a lower rate to a run whose gradients are often clipped.

    If the gradients are long because of their noise, a larger batch helps too; it is advised if
    the run would still have enough steps.
    may_grow: whether a larger batch may be advised.
    """
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
        command=command_for(run, f"optim.lr={new}"),
        urgency=0,
    )


def _may_double(run: RecordedRun) -> bool:
    """Return whether half as many steps are still enough."""
    return run.num_steps >= 2 * FEW_STEPS


def _at_the_floor(run: RecordedRun) -> Iterator[Advice]:
    """Advise a run whose losses are flat, by its gradient noise."""
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
            evidence=say(
                "both losses are flat and the gradient is noisy (rho {ratio})", ratio=f"{ratio:.1f}"
            ),
            command=command_for(run, f"batch.effective={2 * effective}", "batch.accumulation=auto")
            if effective
            else "",
        )
    # clipping would cancel the higher rate
    elif ratio < 0.5 and not _is_clipped(run):
        yield Advice(
            change=say(
                "a higher rate: {new}, or stop; more accumulation will not help",
                new=f"{2 * lr:.2g}",
            ),
            effect_on_result="different",
            evidence=say(
                "both losses are flat and the gradient is not noisy (rho {ratio})",
                ratio=f"{ratio:.1f}",
            ),
            command=command_for(run, f"optim.lr={2 * lr:.2g}"),
        )


def _trend(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the relative change over the second half: of its last third's mean to its first's."""
    finite = values[np.isfinite(values)]
    half = finite[len(finite) // 2 :]
    part = max(len(half) // 3, 1)
    before, after = float(half[:part].mean()), float(half[-part:].mean())
    return after / before - 1 if before else 0.0


def _noise_ratio(run: RecordedRun) -> float | None:
    """Return rho, the noise scale over the batch, at the end of the run; None if not measured."""
    known = run.train["noise_ratio"][np.isfinite(run.train["noise_ratio"])]
    return float(known[-1]) if len(known) else None


def _clipped_fraction(run: RecordedRun) -> float | None:
    """Return the fraction of steps whose gradients were clipped, or None if unknown."""
    clip, norms = run.settings.get("optim.clip"), run.train["grad_norm"]
    norms = norms[np.isfinite(norms)]
    if not isinstance(clip, int | float) or clip <= 0 or not len(norms):
        return None
    return float((norms > clip).mean())


def _is_clipped(run: RecordedRun) -> bool:
    return (_clipped_fraction(run) or 0.0) > 0.5


def _length(run: RecordedRun) -> Iterator[Advice]:
    """Advise a run with few steps to be longer, or to have a smaller batch and so more steps.

    A smaller batch makes the gradient noisier, so it is not advised where noise is a problem.
    """
    effective = run.summary.get("effective_batch")
    if not (
        0 < run.num_steps < FEW_STEPS
        and run.state == "finished"
        and isinstance(effective, int)
        and effective > 4
    ):
        return
    evidence = say(
        "only {num} optimizer steps: under {few} the rate's schedule hardly works",
        num=run.num_steps,
        few=FEW_STEPS,
    )
    longer = _longer(run)
    if _is_clipped(run) or (_noise_ratio(run) or 0.0) > 1:
        change, changes = say("a longer run: {changes}", changes=longer), [longer]
        evidence = say(
            "{evidence}; with fewer samples a step its gradient would be noisier", evidence=evidence
        )
    else:
        change = say(
            "fewer samples a step ({new}), or a longer run: {changes}",
            new=effective // 2,
            changes=longer,
        )
        changes = [
            f"batch.effective={effective // 2}",
            "batch.micro=auto",
            "batch.accumulation=auto",
        ]
    yield Advice(
        change=change,
        effect_on_result="different",
        evidence=evidence,
        command=command_for(run, *changes),
        urgency=0,
    )


def _longer(run: RecordedRun) -> str:
    """Return the override with which the run has FEW_STEPS steps.

    It is in the unit of the configuration: steps, tokens or epochs.
    """
    for key in ("train.steps", "train.tokens"):
        if isinstance(given := run.settings.get(key), int):
            return f"{key}={math.ceil(given * FEW_STEPS / run.num_steps)}"
    epochs = run.settings.get("train.epochs")
    before = epochs if isinstance(epochs, int | float) else 1
    return f"train.epochs={math.ceil(before * FEW_STEPS / run.num_steps)}"
