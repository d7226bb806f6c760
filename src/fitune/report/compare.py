"""Runs side by side, at equal tokens.

Different batches take different numbers of steps, so losses are read off where every run has seen the same tokens: the
evaluations on both sides of that place, and between them a straight line. A difference comes with its interval
(`interval.py`). What lies within the noise counts as equal, also for the Pareto set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fitune.boundary import bounded
from fitune.display import HtmlDisplay
from fitune.errors import RunDirectoryError
from fitune.language import say
from fitune.language.printable import printable_line
from fitune.report.run_on_disk import RecordedRun
from fitune.report.sources import read_recorded
from fitune.run.interval import ConfidenceInterval, differ, paired_interval

SAME_LOSS = 0.02
"""Nats: rounding alone (bfloat16 sums in another order) stays below it; another batch or another rate does not."""
SPEED_NOISE_FRACTION = 0.02
PEAK_NOISE_FRACTION = 0.01
TRAIN_WINDOW_FRACTION = 1 / 3
MOST_STRETCHES = 20
HOW_IT_IS_COMPUTED = (
    "batch.", "memory.", "run.", "eval.", "model.recompute", "model.attention", "loss", "data.packing",
    "train.save_every", "train.eval_every", "train.stop_after",
)  # fmt: skip
"""Keys that change how a step is computed or what is kept of it, not what the step is. (batch.effective is compared by
its value.)"""
PEAKS = {
    "reserved": ("peak_reserved_bytes", "peak_reserved_bytes"),
    "device": ("peak_device_bytes", "device_used_bytes"),
    "allocated": ("peak_allocated_bytes", "peak_allocated_bytes"),
}
"""What a peak may be of -> its name in the summary, and that of a step's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run of a comparison; unknown is None. Losses are at the comparison's tokens: eval_loss of the held-out rows,
    train_loss over the last third of these tokens. *_difference: to the first run. run_peak_bytes: of the whole run, in
    all rows of one kind: reserved by PyTorch (on a CPU taken by the process beyond the program) where every run tells
    it. predicted_bytes, measured_bytes: reserved, of the step that was predicted. seconds: of training, to these
    tokens. on_front: no other run is as good in peak, loss and speed and better in one of them, beyond noise."""

    run: RecordedRun
    effective_batch: int | None
    split: str
    lr: float | None
    predicted_bytes: int | None
    measured_bytes: int | None
    run_peak_bytes: int | None
    tokens_per_second: float | None
    seconds: float | None
    train_loss: float | None
    eval_loss: float | None
    train_difference: ConfidenceInterval | None
    eval_difference: ConfidenceInterval | None
    on_front: bool = False

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def peak_bytes(self) -> int | None:
        """The prediction of a run that did not take place."""
        return self.run_peak_bytes if self.run_peak_bytes is not None else self.predicted_bytes

    @property
    def prediction_error(self) -> float | None:
        """0.1: ten per cent more was predicted than the step took."""
        return self.predicted_bytes / self.measured_bytes - 1 if self.predicted_bytes and self.measured_bytes else None


@dataclass(frozen=True, slots=True)
class CurveCheck:
    """Two runs that are the same training computed in two ways, and how far their training losses are apart."""

    first: str
    second: str
    max_difference: float
    step: int
    num_steps: int

    @property
    def same(self) -> bool:
        return self.max_difference <= SAME_LOSS


@dataclass(frozen=True, slots=True)
class Comparison(HtmlDisplay):
    """tokens: where losses are compared, None where a run did not count them (then each is taken at its end).
    differing: the settings that are not the same in all runs, one value a run. notes: what limits the comparison."""

    rows: tuple[ComparedRun, ...]
    tokens: float | None
    differing: Mapping[str, tuple[Any, ...]]
    checks: tuple[CurveCheck, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """In a sentence; the fields hold all of it."""
        names = ", ".join(row.name for row in self.rows)
        return f"Comparison: {names}" + ("" if self.tokens is None else f" · {self.tokens:,.0f} tokens")


@bounded("fitune.compare")
def compare(runs: Sequence[RecordedRun | Path | str], *, tokens: float | None = None) -> Comparison:
    """Runs, or what `read_recorded` reads; the first is what the others are compared with. tokens: where to compare,
    as far as every run has come where left out. Raises RunDirectoryError."""
    found = list({run.path: run for run in _found(runs)}.values())  # one given twice stands once
    if not found:
        raise RunDirectoryError("nothing to compare: give the directories of runs")
    found = _with_names(found)
    if tokens is not None and not tokens > 0:
        raise RunDirectoryError(f"{tokens:,.0f} tokens are no place to compare at: give more than 0 with --at")
    reached = [float(run.evals["total_tokens"].max(initial=0)) or run.total_tokens for run in found if run.num_steps]
    common = min((tokens for tokens in reached if np.isfinite(tokens)), default=float("nan"))
    if tokens is not None and not tokens <= common:
        raise RunDirectoryError(
            f"{tokens:,.0f} tokens were not reached by all: at most {common:,.0f} can be compared; lower --at"
        )
    place = tokens if tokens is not None else common if np.isfinite(common) else None
    kind = _common_peak(found)
    rows = [_row(run, found[0], place, peak_kind=kind) for run in found]
    return Comparison(
        rows=_with_front(rows, place),
        tokens=place,
        differing=differing_settings(found),
        checks=tuple(_checks(found)),
        notes=tuple(_notes(found, place, peak_kind=kind)),
    )


def _found(runs: Sequence[RecordedRun | Path | str]) -> Iterator[RecordedRun]:
    for run in runs:
        if isinstance(run, RecordedRun):
            yield run
        else:
            yield from read_recorded(Path(run))


def _with_names(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Two runs of one name are told apart by their directories."""
    names = [run.name for run in runs]
    shown = [run.path if names.count(run.name) > 1 else run.name for run in runs]
    return [replace(run, name=printable_line(name)) for run, name in zip(runs, shown, strict=True)]


def _row(run: RecordedRun, first: RecordedRun, place: float | None, *, peak_kind: str | None) -> ComparedRun:
    summary = run.summary
    micro, accumulation = last_split(run)
    split = "n/a" if micro is None else f"{micro} x {accumulation}"
    return ComparedRun(
        run=run,
        effective_batch=effective_batch(run),
        split=split,
        lr=peak_lr(run),
        predicted_bytes=summary.get("predicted_reserved_bytes") or planned_bytes(run),
        measured_bytes=measured_step_bytes(run),
        run_peak_bytes=run_peaks(run).get(peak_kind or ""),
        tokens_per_second=tokens_per_second(run),
        seconds=_at(run.train["total_tokens"], run.train["seconds"], place),
        train_loss=train_loss(run, place),
        eval_loss=eval_loss(run, place),
        train_difference=None if run is first else _train_interval(run, first, place),
        eval_difference=None if run is first else _eval_interval(run, first, place),
    )


def effective_batch(run: RecordedRun) -> int | None:
    value = run.summary.get("effective_batch") or run.settings.get("batch.effective")
    return value if isinstance(value, int) else None


def last_split(run: RecordedRun) -> tuple[int | None, int | None]:
    """(rows of a micro-batch, micro-batches of a step): as configured, else as most steps had it."""
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
    """What the plan promised for the setting that it chose, or for the first where nothing fits."""
    candidate = planned_candidate(run)
    return None if candidate is None else candidate.get("predicted_reserved_bytes")


def planned_candidate(run: RecordedRun) -> Mapping[str, Any] | None:
    candidates = (run.plan or {}).get("candidates") or []
    chosen = (run.plan or {}).get("chosen")
    if not candidates:
        return None
    found: Mapping[str, Any] = candidates[chosen if isinstance(chosen, int) and chosen < len(candidates) else 0]
    return found


def measured_step_bytes(run: RecordedRun) -> int | None:
    """Of the step that was predicted: of a run of fitune the second, else the one that took most."""
    return run.summary.get("measured_reserved_bytes") or _largest(run.train["peak_reserved_bytes"])


def run_peaks(run: RecordedRun) -> dict[str, int]:
    """kind -> the largest of the whole run, evaluations included where its summary tells. The steps count too: the
    summary of a run that died is of its last save."""
    found = {}
    for kind, (total, column) in PEAKS.items():
        if most := max(run.summary.get(total) or 0, _largest(run.train[column]) or 0):
            found[kind] = most
    return found


def _common_peak(runs: Sequence[RecordedRun]) -> str | None:
    """The first kind that all runs tell which tell any."""
    known = [peaks for run in runs if (peaks := run_peaks(run))]
    return next((kind for kind in PEAKS if known and all(kind in peaks for peaks in known)), None)


def _largest(column: npt.NDArray[np.float64]) -> int | None:
    most = column[np.isfinite(column)].max(initial=0.0)
    return int(most) if most > 0 else None


def tokens_per_second(run: RecordedRun) -> float | None:
    """Of training alone, without the first steps, which warm up; evaluation and saving are not in it."""
    speeds = _speeds(run)
    if speeds is None:
        given = run.train["tokens_per_second"][np.isfinite(run.train["tokens_per_second"])]
        return float(np.median(given)) if len(given) else None
    tokens, seconds = speeds
    return float(tokens.sum() / seconds.sum())


def _speeds(run: RecordedRun) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """(tokens, seconds) of the steps after the first twentieth, at least one step, where they are known."""
    tokens = np.diff(run.train["total_tokens"], prepend=0.0)
    seconds = np.diff(run.train["seconds"], prepend=0.0)
    skipped = min(max(1, len(tokens) // 20), max(len(tokens) - 1, 0))
    used = np.isfinite(tokens) & np.isfinite(seconds) & (seconds > 0)
    used[:skipped] = False
    return (tokens[used], seconds[used]) if used.any() else None


def _at(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], place: float | None) -> float | None:
    """y where x is `place`, on a straight line between the neighbours; the last y where there is no place."""
    known = np.isfinite(y) & (np.isfinite(x) | (place is None))
    if not known.any():
        return None
    if place is None:
        return float(y[known][-1])
    return float(np.interp(place, x[known], y[known]))


def diverged_at(run: RecordedRun) -> int | None:
    """The first step from which on no loss is a number, None where the last one is."""
    for curve, name in ((run.train, "loss"), (run.evals, "eval_loss")):
        if len(curve[name]) and not np.isfinite(curve[name][-1]):
            numbers = np.flatnonzero(np.isfinite(curve[name]))
            return int(curve["step"][numbers[-1] + 1 if len(numbers) else 0])
    return None


def eval_loss(run: RecordedRun, place: float | None) -> float | None:
    if diverged_at(run) is not None:
        return None
    return _at(run.evals["total_tokens"], run.evals["eval_loss"], place)


def train_loss(run: RecordedRun, place: float | None) -> float | None:
    if diverged_at(run) is not None:
        return None
    means = _stretch_means(run, place, num_stretches=1)
    if means is None:
        finite = run.train["loss"][np.isfinite(run.train["loss"])]
        return float(finite[-max(1, round(len(finite) * TRAIN_WINDOW_FRACTION)) :].mean()) if len(finite) else None
    return float(means[0])


def _stretch_means(run: RecordedRun, place: float | None, *, num_stretches: int) -> npt.NDArray[np.float64] | None:
    """Mean training loss of equal stretches of the last third of the tokens up to `place`."""
    tokens, loss = run.train["total_tokens"], run.train["loss"]
    if place is None or not len(tokens) or not np.isfinite(tokens).all():
        return None
    place = min(place, float(tokens[-1]))
    sums = np.concatenate(([0.0], np.cumsum(loss * np.diff(tokens, prepend=0.0))))
    edges = np.linspace(place * (1 - TRAIN_WINDOW_FRACTION), place, num_stretches + 1)
    means: npt.NDArray[np.float64] = np.diff(np.interp(edges, np.concatenate(([0.0], tokens)), sums)) / np.diff(edges)
    return means


def _train_interval(run: RecordedRun, first: RecordedRun, place: float | None) -> ConfidenceInterval | None:
    steps = [_steps_in_window(each, place) for each in (run, first)]
    num_stretches = min(MOST_STRETCHES, *steps)
    one, other = (_stretch_means(each, place, num_stretches=max(num_stretches, 1)) for each in (run, first))
    return None if one is None or other is None else paired_interval(one, other, np.ones(len(one)))


def _steps_in_window(run: RecordedRun, place: float | None) -> int:
    tokens = run.train["total_tokens"]
    if place is None:
        return 0
    return int(((tokens > place * (1 - TRAIN_WINDOW_FRACTION)) & (tokens <= place)).sum())


def rows_at(run: RecordedRun, place: float | None) -> tuple[npt.NDArray[np.float64], tuple[float, ...]] | None:
    """(loss of each held-out row at `place`, weights): between two evaluations on a straight line."""
    if not run.eval_rows:
        return None
    after = next(
        (rows for rows in run.eval_rows if place is not None and rows.total_tokens >= place), run.eval_rows[-1]
    )
    before = [rows for rows in run.eval_rows if rows.total_tokens < after.total_tokens]
    losses = np.array(after.losses)
    if place is not None and before and place < after.total_tokens and before[-1].weights == after.weights:
        share = (place - before[-1].total_tokens) / (after.total_tokens - before[-1].total_tokens)
        losses = np.array(before[-1].losses) * (1 - share) + losses * share
    return losses, after.weights


def _paired_rows(
    run: RecordedRun, other: RecordedRun, place: float | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[float, ...]] | None:
    """None where the two were not evaluated on the same rows."""
    one, two = rows_at(run, place), rows_at(other, place)
    return (one[0], two[0], one[1]) if one and two and one[1] == two[1] else None


def _eval_interval(run: RecordedRun, other: RecordedRun, place: float | None) -> ConfidenceInterval | None:
    paired = _paired_rows(run, other, place)
    return None if paired is None else paired_interval(*paired)


def eval_interval(comparison: Comparison, first: str, second: str) -> ConfidenceInterval | None:
    """The difference of two runs of a comparison, by name: first - second."""
    runs = {row.name: row.run for row in comparison.rows}
    return _eval_interval(runs[first], runs[second], comparison.tokens)


def differing_settings(runs: Sequence[RecordedRun]) -> Mapping[str, tuple[Any, ...]]:
    """Where the runs were written and named is not among them."""
    keys = sorted({key for run in runs for key in run.settings if not key.startswith("run.")})
    table = {key: tuple(run.settings.get(key) for run in runs) for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def _checks(runs: Sequence[RecordedRun]) -> Iterator[CurveCheck]:
    for first, second in combinations(runs, 2):
        if _same_training(first, second) and (check := _curve_check(first, second)) is not None:
            yield check


def _same_training(first: RecordedRun, second: RecordedRun) -> bool:
    if effective_batch(first) is None or effective_batch(first) != effective_batch(second):
        return False
    if not (first.settings and second.settings) or first.summary.get("data_hash") != second.summary.get("data_hash"):
        return False
    return all(key.startswith(HOW_IT_IS_COMPUTED) for key in differing_settings((first, second)))


def _curve_check(first: RecordedRun, second: RecordedRun) -> CurveCheck | None:
    steps, one, two = np.intersect1d(first.train["step"], second.train["step"], return_indices=True)
    differences = np.abs(first.train["loss"][one] - second.train["loss"][two])
    if not len(steps) or not np.isfinite(differences).all():
        return None
    worst = int(differences.argmax())
    return CurveCheck(first.name, second.name, float(differences[worst]), int(steps[worst]), len(steps))


def _with_front(rows: Sequence[ComparedRun], place: float | None) -> tuple[ComparedRun, ...]:
    beaten = {two.name for one in rows for two in rows if one is not two and _beats(one, two, place)}
    known = [row for row in rows if row.run.num_steps and (row.eval_loss is not None or row.train_loss is not None)]
    front = {row.name for row in known} - beaten or {row.name for row in known}
    return tuple(replace(row, on_front=row.name in front) for row in rows)


def _beats(one: ComparedRun, two: ComparedRun, place: float | None) -> bool:
    """Whether `one` is nowhere worse than `two` and somewhere better, beyond noise, in what is known of both."""
    signs = [
        _sign(one.peak_bytes, two.peak_bytes, PEAK_NOISE_FRACTION),
        -_sign(one.tokens_per_second, two.tokens_per_second, SPEED_NOISE_FRACTION),
        _loss_sign(one, two, place),
    ]
    return max(signs) <= 0 and min(signs) < 0


def _sign(one: float | None, two: float | None, noise_fraction: float) -> int:
    """-1 where `one` is less, 1 where it is more, 0 within the noise or where one is unknown."""
    if one is None or two is None or abs(one - two) <= noise_fraction * max(abs(one), abs(two)):
        return 0
    return -1 if one < two else 1


def _loss_sign(one: ComparedRun, two: ComparedRun, place: float | None) -> int:
    paired = _paired_rows(one.run, two.run, place)
    if paired is not None:
        losses, others, weights = paired
        if not differ(losses, others, weights):
            return 0
        return -1 if np.average(losses - others, weights=weights) < 0 else 1
    if one.eval_loss is not None and two.eval_loss is not None:
        return _sign(one.eval_loss, two.eval_loss, SPEED_NOISE_FRACTION)
    return _sign(one.train_loss, two.train_loss, SPEED_NOISE_FRACTION)


def _notes(runs: Sequence[RecordedRun], place: float | None, *, peak_kind: str | None) -> Iterator[str]:
    for run in runs:
        yield from run.notes
        if (step := diverged_at(run)) is not None:
            yield say(
                "{name} diverged: from step {step} on its loss is not a number, so its losses are not compared",
                name=run.name,
                step=f"{step:,}",
            )
    if peak_kind is None and any(map(run_peaks, runs)):
        yield say("the runs tell peaks of different kinds, which cannot be compared")
    elif peak_kind not in (None, "reserved") and any("reserved" in run_peaks(run) for run in runs):
        yield say("not every run tells what was reserved: the peaks are of what all tell, {kind}", kind=peak_kind)
    uncounted = [run.name for run in runs if run.num_steps and not np.isfinite(run.total_tokens)]
    if uncounted and len(runs) > 1:
        yield say(
            "{names}: tokens were not counted, so this is no comparison at equal tokens", names=", ".join(uncounted)
        )
    if len({run.summary.get("data_hash") for run in runs} - {None}) > 1:
        yield say("the runs were trained on different data")
    if len({(run.data or {}).get("held_out_hash") for run in runs} - {None}) > 1:
        yield say("the runs were evaluated on different held-out samples: their eval losses cannot be compared")
    if len({run.settings.get("train.seed") for run in runs} - {None}) > 1:
        yield say("the runs have different seeds: the difference between seeds is in every difference shown")
    elif len(runs) > 1 and any(run.eval_rows for run in runs):
        yield say("an interval covers which samples were held out; another seed of training may differ by more")
