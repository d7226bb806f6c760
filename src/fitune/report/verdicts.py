"""Writes the results of a comparison as sentences."""

import math
from collections.abc import Iterator

import numpy as np

from fitune.batch_size.scaling import rate_factor
from fitune.language import say
from fitune.optimizers.table import OPTIMIZERS
from fitune.report.compare import ComparedRun, Comparison, CurveCheck, eval_interval
from fitune.report.run_figures import last_split
from fitune.units import format_bytes, format_count


def verdicts(comparison: Comparison) -> list[str]:
    """Return what the comparison shows, one sentence each.

    They say which run is best, which fit, which are the same training, what a larger batch cost and
    gained, and which rate was best.
    """
    return [
        *_best(comparison),
        *_fits(comparison),
        *(_same(comparison, check) for check in comparison.checks),
        *_accumulation(comparison),
        *_allowed_rates(comparison),
        *_rates(comparison),
    ]


def _fits(comparison: Comparison) -> Iterator[str]:
    unfit = [row for row in comparison.rows if row.run.state == "does not fit"]
    for row in unfit:
        budget = (row.run.plan or {}).get("budget_bytes")
        yield say(
            "{name} does not fit: it needs {needed} of {budget}",
            name=row.name,
            needed=format_bytes(row.predicted_bytes),
            budget=format_bytes(budget),
        )
    ran = [row for row in comparison.rows if row.run.num_steps]
    if len(comparison.rows) > 1 and ran and any(row.run_peak_bytes for row in ran):
        listed = ", ".join(f"{row.name} {format_bytes(row.run_peak_bytes)}" for row in ran)
        yield say("fits, by the peak as measured: {listed}", listed=listed)
    if listed := "; ".join(
        f"{row.name} {prediction(row)}" for row in ran if row.prediction_error is not None
    ):
        yield say("the step that was predicted, predicted and measured: {listed}", listed=listed)


def prediction(row: ComparedRun) -> str:
    """Return the predicted and the measured memory of a step: '19.0 GiB, 20.0 GiB (-5.0%)'."""
    error = "" if row.prediction_error is None else f" ({row.prediction_error:+.1%})"
    return f"{format_bytes(row.predicted_bytes)}, {format_bytes(row.measured_bytes)}{error}"


def _same(comparison: Comparison, check: CurveCheck) -> str:
    """Return whether two runs that should be the same training have the same losses."""
    rows = {row.name: row for row in comparison.rows}
    first, second = rows[check.first], rows[check.second]
    values = {
        "first": check.first,
        "second": check.second,
        "difference": f"{check.max_difference:.2g}",
        "step": f"{check.step:,}",
        "num_steps": f"{check.num_steps:,}",
    }
    if not check.same:
        return say(
            "{first} and {second} should be the same training, but their losses differ by {difference} at step {step} "
            "of {num_steps}",
            **values,
        )
    return say(
        "{first} and {second} are the same run: their losses differ by at most {difference} over {num_steps} steps. "
        "Choose by memory and speed: {facts}",
        **values,
        facts=_memory_and_speed(first, second),
    )


def _memory_and_speed(first: ComparedRun, second: ComparedRun) -> str:
    """Return which of two runs needs less memory, and which is faster."""
    parts = []
    if first.peak_bytes and second.peak_bytes:
        lower, higher = sorted((first, second), key=lambda row: row.peak_bytes or 0)
        assert lower.peak_bytes is not None
        assert higher.peak_bytes is not None
        parts.append(
            say(
                "{name} takes {less} less",
                name=lower.name,
                less=format_bytes(higher.peak_bytes - lower.peak_bytes),
            )
        )
    if first.tokens_per_second and second.tokens_per_second:
        slower, faster = sorted((first, second), key=lambda row: row.tokens_per_second or 0.0)
        assert slower.tokens_per_second is not None
        assert faster.tokens_per_second is not None
        gain = faster.tokens_per_second / slower.tokens_per_second - 1
        parts.append(say("{name} is {gain} faster", name=faster.name, gain=f"{gain:.0%}"))
    return ", ".join(parts) or "n/a"


def _accumulation(comparison: Comparison) -> Iterator[str]:
    """Compare the best run of each larger batch with the best run of the smallest batch."""
    batches = sorted(
        {row.effective_batch for row in comparison.rows if row.effective_batch and row.eval_loss}
    )
    if len(batches) < 2:
        return
    best = {
        batch: _lowest([row for row in comparison.rows if row.effective_batch == batch])
        for batch in batches
    }
    small = best[batches[0]]
    for batch in batches[1:]:
        large = best[batch]
        if small is None or large is None:
            continue
        speed = ""
        if small.tokens_per_second and large.tokens_per_second:
            change = large.tokens_per_second / small.tokens_per_second - 1
            speed = say("{change} tokens/s", change=f"{change:+.0%}".replace("-0%", "+0%"))
        peak = ""
        if small.peak_bytes and large.peak_bytes:
            sign = "+" if large.peak_bytes >= small.peak_bytes else "-"
            peak = f"{sign}{format_bytes(abs(large.peak_bytes - small.peak_bytes))}"
        yield say(
            "from {few} to {many} samples a step ({small} to {large}), each at its best rate, at equal tokens: "
            "eval loss {difference}; {cost}",
            few=batches[0],
            many=batch,
            small=small.name,
            large=large.name,
            difference=_difference(comparison, large, small),
            cost=", ".join(part for part in (speed, peak) if part) or "n/a",
        )


def _allowed_rates(comparison: Comparison) -> Iterator[str]:
    """Say which rate the gradient noise allows for each larger batch.

    The rates are relative to the best rate of the smallest batch.
    """
    batches = sorted({row.effective_batch for row in comparison.rows if row.effective_batch})
    # The noise is that of a run with the smallest batch: with a larger batch a run gets less far in
    # the same number of tokens, and the noise is smaller there. A measurement over two or more
    # micro-batches is more accurate.
    measured = sorted(
        (row for row in comparison.rows if row.effective_batch and _noise_rows(row) is not None),
        key=lambda row: (row.effective_batch, (last_split(row.run)[1] or 1) < 2, finite_loss(row)),
    )
    smallest = [row for row in comparison.rows if batches and row.effective_batch == batches[0]]
    small = _lowest(smallest)
    if not measured or small is None or small.lr is None:
        return
    noise = _noise_rows(measured[0])
    # the run of another trainer may have an optimizer with any name
    kind = OPTIMIZERS.get(small.run.settings.get("optim.name", "adamw"))
    adaptive = kind is None or kind.is_adaptive
    assert noise is not None
    for batch in batches[1:]:
        factor, most = (
            rate_factor("sqrt_gain", batch / batches[0], rho=rho, adaptive=adaptive)
            for rho in (noise / batches[0], math.inf)
        )
        yield say(
            "the noise scale of {name} is {noise} samples: from {few} to {many} samples a step it allows {factor} "
            "times the rate that is right for {few}, so {scaled} for {lr}; however noisy, {most} times at most",
            name=measured[0].name,
            noise=f"{noise:,.3g}",
            few=batches[0],
            many=batch,
            factor=f"{factor:.2f}",
            scaled=f"{small.lr * factor:.2g}",
            lr=f"{small.lr:.2g}",
            most=f"{most:.2g}",
        )


def _noise_rows(row: ComparedRun) -> float | None:
    """Return the noise scale of a run in samples: the median over the last three quarters.

    Steps whose noise could not be measured do not count. Returns None if no step was measured, or
    if the batch changed during the run.
    """
    ratios = row.run.train["noise_ratio"]
    later = ratios[len(ratios) // 4 :]
    known = later[np.isfinite(later)]
    stays = row.run.settings.get("train.batch_mode", "advise") == "advise"
    if not len(known) or row.effective_batch is None or not stays:
        return None
    return float(np.median(known)) * row.effective_batch


def _rates(comparison: Comparison) -> Iterator[str]:
    """Say which of the tried rates was best, for each batch."""
    for batch in sorted({row.effective_batch for row in comparison.rows if row.effective_batch}):
        rows = [
            row
            for row in comparison.rows
            if row.effective_batch == batch and row.lr and row.eval_loss
        ]
        best = _lowest(rows)
        others = {
            row.lr: row
            for row in sorted(rows, key=finite_loss, reverse=True)
            if best and row.lr != best.lr
        }
        if best is None or not others:
            continue
        listed = "; ".join(
            say(
                "{rate} {difference}",
                rate=f"{lr:.2g}",
                difference=_difference(comparison, row, best),
            )
            for lr, row in sorted(others.items())
        )
        yield say(
            "with {batch} samples a step the best rate tried is {rate} (eval loss {loss}); beside it: {listed}",
            batch=batch,
            rate=f"{best.lr:.2g}",
            loss=f"{best.eval_loss:.4f}",
            listed=listed,
        )


def best_rows(comparison: Comparison) -> list[ComparedRun]:
    """Return the runs with a known eval loss, the lowest first."""
    rows = [row for row in comparison.rows if np.isfinite(finite_loss(row))]
    return sorted(rows, key=finite_loss)


def winner(comparison: Comparison) -> tuple[ComparedRun, ComparedRun] | None:
    """Return the run with the lowest eval loss, and the one that its lead is measured to.

    That is the next run that can be told apart from it, or the next one if none can.
    """
    rows = best_rows(comparison)
    if len(rows) < 2:
        return None
    best, *others = rows
    apart = (row for row in others if not _is_equal(comparison, row, best))
    return best, next(apart, others[0])


def _is_equal(comparison: Comparison, row: ComparedRun, best: ComparedRun) -> bool:
    """Return whether the difference of two eval losses is within chance."""
    found = eval_interval(comparison, row.name, best.name)
    return found is not None and not found.excludes_zero


def _best(comparison: Comparison) -> Iterator[str]:
    """Say which run won and by how much."""
    found = winner(comparison)
    if found is None:
        yield from _lowest_training_loss(comparison)
        return
    best, other = found
    rows = best_rows(comparison)
    equal = [row.name for row in rows[1:] if _is_equal(comparison, row, best)]
    rates = {row.lr for row in rows if row.lr}
    rate = (
        say(" (learning rate {rate})", rate=f"{best.lr:.2g}") if len(rates) > 1 and best.lr else ""
    )
    yield say(
        "best: {name}{rate}, with the lowest eval loss, {loss}, {difference} to {other}; "
        "{speed} tokens/s, {peak}",
        name=best.name,
        rate=rate,
        loss=f"{best.eval_loss:.4f}",
        difference=_difference(comparison, best, other),
        other=other.name,
        speed=format_count(best.tokens_per_second),
        peak=format_bytes(best.peak_bytes),
    ) + (say("; not told apart from it: {equal}", equal=", ".join(equal)) if equal else "")


def _lowest_training_loss(comparison: Comparison) -> Iterator[str]:
    rows = [row for row in comparison.rows if row.train_loss is not None]
    if len(rows) < 2:
        return
    first, second, *_ = sorted(rows, key=lambda row: row.train_loss or 0.0)
    yield say(
        "lowest training loss: {name}, {loss}, before {other}, {next_loss}; without evaluations of "
        "both, none is said to be better",
        name=first.name,
        loss=f"{first.train_loss:.4f}",
        other=second.name,
        next_loss=f"{second.train_loss:.4f}",
    )


def _difference(comparison: Comparison, row: ComparedRun, other: ComparedRun) -> str:
    """Return the difference of the eval losses, row - other, with its interval if there is one."""
    interval = eval_interval(comparison, row.name, other.name)
    if interval is None:
        assert row.eval_loss is not None
        assert other.eval_loss is not None
        return say("{change} (no interval)", change=f"{row.eval_loss - other.eval_loss:+.4f}")
    values = {
        "change": f"{interval.mean:+.4f}",
        "low": f"{interval.low:+.4f}",
        "high": f"{interval.high:+.4f}",
    }
    if interval.excludes_zero:
        return say("{change} (95 %: {low} to {high})", **values)
    return say("{change} (95 %: {low} to {high}, within chance)", **values)


def finite_loss(row: ComparedRun) -> float:
    """Return the eval loss, or infinity if it is unknown."""
    loss = row.eval_loss
    return loss if loss is not None and np.isfinite(loss) else float("inf")


def _lowest(rows: list[ComparedRun]) -> ComparedRun | None:
    known = [row for row in rows if np.isfinite(finite_loss(row))]
    return min(known, key=finite_loss, default=None)


def outcome(row: ComparedRun) -> str:
    """Return the results of one run as a sentence."""
    evals = row.run.evals["eval_loss"]
    finite = evals[np.isfinite(evals)]
    change = say("no evaluation") if not len(finite) else f"{finite[0]:.3f} → {finite[-1]:.3f}"
    return say(
        "{state} after {steps} steps: eval loss {change}, peak memory {peak} (the predicted step: "
        "{predicted}, measured {measured}), {speed} tokens/s",
        state=row.run.state,
        steps=f"{row.run.num_steps:,}",
        change=change,
        peak=format_bytes(row.run_peak_bytes),
        predicted=format_bytes(row.predicted_bytes),
        measured=format_bytes(row.measured_bytes),
        speed=format_count(row.tokens_per_second),
    )
