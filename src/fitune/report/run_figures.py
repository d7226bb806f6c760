"""Reads figures off a recorded run: batch, rate, predicted and measured peaks, speed, losses.

`place` is everywhere the number of tokens at which runs are compared; None for the end of the run.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fitune.report.run_on_disk import RecordedRun

#: the training loss is the mean over this last part of the tokens
TRAIN_WINDOW_FRACTION = 1 / 3
#: what a peak is measured of -> its key in the summary, and its column in the metrics of the steps
PEAKS = {
    "reserved": ("peak_reserved_bytes", "peak_reserved_bytes"),
    "device": ("peak_device_bytes", "device_used_bytes"),
    "allocated": ("peak_allocated_bytes", "peak_allocated_bytes"),
}


def effective_batch(run: RecordedRun) -> int | None:
    value = run.summary.get("effective_batch") or run.settings.get("batch.effective")
    return value if isinstance(value, int) else None


def last_split(run: RecordedRun) -> tuple[int | None, int | None]:
    """Return (samples of a micro-batch, micro-batches of a step).

    They are as configured, or as in most steps if the configuration left them open.
    """
    micro, accumulation = run.settings.get("batch.micro"), run.settings.get("batch.accumulation")
    rows, effective = _most_common(run.train["micro_batch"]), effective_batch(run)
    if not isinstance(micro, int):
        micro = rows
    if micro is not None and effective is not None:
        accumulation = -(-effective // micro)
    if not isinstance(accumulation, int):
        accumulation = _most_common(run.train["num_micro_batches"])
    return micro, accumulation


def _most_common(column: npt.NDArray[np.float64]) -> int | None:
    values, counts = np.unique(column[np.isfinite(column)], return_counts=True)
    return int(values[counts.argmax()]) if len(values) else None


def peak_lr(run: RecordedRun) -> float | None:
    value = run.settings.get("optim.lr")
    if isinstance(value, int | float):
        return float(value)
    highest = run.train["lr"][np.isfinite(run.train["lr"])].max(initial=-np.inf)
    return float(highest) if np.isfinite(highest) else None


def planned_bytes(run: RecordedRun) -> int | None:
    """Return the reserved memory that the plan predicted for the run's setting."""
    candidate = planned_candidate(run)
    return None if candidate is None else candidate.get("predicted_reserved_bytes")


def planned_candidate(run: RecordedRun) -> Mapping[str, Any] | None:
    """Return the candidate that the run's plan chose, or the first where nothing fits."""
    candidates = (run.plan or {}).get("candidates") or []
    chosen = (run.plan or {}).get("chosen")
    if not candidates:
        return None
    index = chosen if isinstance(chosen, int) and chosen < len(candidates) else 0
    found: Mapping[str, object] = candidates[index]
    return found


def measured_step_bytes(run: RecordedRun) -> int | None:
    """Return the reserved memory of the step that was predicted.

    That is the second step of a run of fitune, and the largest step of any other run.
    """
    return run.summary.get("measured_reserved_bytes") or _largest(run.train["peak_reserved_bytes"])


def run_peaks(run: RecordedRun) -> dict[str, int]:
    """Return the peak of the whole run for each kind of PEAKS that it recorded.

    The peak includes evaluations if the run has a summary.
    """
    # the metrics of the steps count too, because the summary of a run that was killed is older
    found = {}
    for kind, (total, column) in PEAKS.items():
        if most := max(run.summary.get(total) or 0, _largest(run.train[column]) or 0):
            found[kind] = most
    return found


def _largest(column: npt.NDArray[np.float64]) -> int | None:
    most = column[np.isfinite(column)].max(initial=0.0)
    return int(most) if most > 0 else None


def tokens_per_second(run: RecordedRun) -> float | None:
    """Return the speed of training without the first steps, which warm up.

    Evaluation and saving are not included.
    """
    speeds = _speeds(run)
    if speeds is None:
        given = run.train["tokens_per_second"][np.isfinite(run.train["tokens_per_second"])]
        return float(np.median(given)) if len(given) else None
    tokens, seconds = speeds
    return float(tokens.sum() / seconds.sum())


def _speeds(run: RecordedRun) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Return (tokens, seconds) of each step after the first twentieth, or None if unknown.

    One step at least is skipped, unless there is only one.
    """
    tokens = np.diff(run.train["total_tokens"], prepend=0.0)
    seconds = np.diff(run.train["seconds"], prepend=0.0)
    skipped = min(max(1, len(tokens) // 20), max(len(tokens) - 1, 0))
    used = np.isfinite(tokens) & np.isfinite(seconds) & (seconds > 0)
    used[:skipped] = False
    return (tokens[used], seconds[used]) if used.any() else None


def value_at(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], place: float | None
) -> float | None:
    """Return y at x = `place`, interpolated linearly; the last y if `place` is None."""
    known = np.isfinite(y) & (np.isfinite(x) | (place is None))
    if not known.any():
        return None
    if place is None:
        return float(y[known][-1])
    return float(np.interp(place, x[known], y[known]))


def diverged_at(run: RecordedRun) -> int | None:
    """Return the first step after the last finite loss, or None if the last loss is finite."""
    for curve, name in ((run.train, "loss"), (run.evals, "eval_loss")):
        if len(curve[name]) and not np.isfinite(curve[name][-1]):
            numbers = np.flatnonzero(np.isfinite(curve[name]))
            return int(curve["step"][numbers[-1] + 1 if len(numbers) else 0])
    return None


def eval_loss(run: RecordedRun, place: float | None) -> float | None:
    if diverged_at(run) is not None:
        return None
    return value_at(run.evals["total_tokens"], run.evals["eval_loss"], place)


def train_loss(run: RecordedRun, place: float | None) -> float | None:
    """Return the mean training loss of the last third of the tokens up to `place`.

    If tokens are unknown, it is the mean over the last third of the steps.
    """
    if diverged_at(run) is not None:
        return None
    means = stretch_means(run, place, num_stretches=1)
    if means is None:
        finite = run.train["loss"][np.isfinite(run.train["loss"])]
        window = max(1, round(len(finite) * TRAIN_WINDOW_FRACTION))
        return float(finite[-window:].mean()) if len(finite) else None
    return float(means[0])


def stretch_means(
    run: RecordedRun, place: float | None, *, num_stretches: int
) -> npt.NDArray[np.float64] | None:
    """Return the mean training loss of equal stretches of the last third of the tokens."""
    tokens, loss = run.train["total_tokens"], run.train["loss"]
    if place is None or not len(tokens) or not np.isfinite(tokens).all():
        return None
    place = min(place, float(tokens[-1]))
    sums = np.concatenate(([0.0], np.cumsum(loss * np.diff(tokens, prepend=0.0))))
    edges = np.linspace(place * (1 - TRAIN_WINDOW_FRACTION), place, num_stretches + 1)
    sums_at_edges = np.interp(edges, np.concatenate(([0.0], tokens)), sums)
    means: npt.NDArray[np.float64] = np.diff(sums_at_edges) / np.diff(edges)
    return means


def num_steps_in_window(run: RecordedRun, place: float | None) -> int:
    tokens = run.train["total_tokens"]
    if place is None:
        return 0
    return int(((tokens > place * (1 - TRAIN_WINDOW_FRACTION)) & (tokens <= place)).sum())


def rows_at(
    run: RecordedRun, place: float | None
) -> tuple[npt.NDArray[np.float64], tuple[float, ...]] | None:
    """Return (loss of each held-out sample at `place`, weights), interpolated linearly."""
    if not run.eval_rows:
        return None
    after = next(
        (rows for rows in run.eval_rows if place is not None and rows.total_tokens >= place),
        run.eval_rows[-1],
    )
    earlier = [rows for rows in run.eval_rows if rows.total_tokens < after.total_tokens]
    before = earlier[-1] if earlier else None
    losses = np.array(after.losses)
    if place is None or before is None or place >= after.total_tokens:
        return losses, after.weights
    if before.weights == after.weights:
        share = (place - before.total_tokens) / (after.total_tokens - before.total_tokens)
        losses = np.array(before.losses) * (1 - share) + losses * share
    return losses, after.weights
