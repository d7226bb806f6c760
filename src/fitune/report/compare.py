"""Compares runs at equal tokens.

Runs with different batches take different numbers of steps, so losses are compared where every run
has seen the same number of tokens. Between two evaluations they are interpolated linearly. Every
difference has a confidence interval (`run/interval.py`). Differences within the noise count as
equal, also for the Pareto front.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fitune.boundary import bounded
from fitune.display import HtmlDisplay
from fitune.errors import RunDirectoryError
from fitune.language import say
from fitune.language.printable import printable_line
from fitune.report.run_figures import (
    PEAKS,
    diverged_at,
    effective_batch,
    eval_loss,
    last_split,
    measured_step_bytes,
    num_steps_in_window,
    peak_lr,
    planned_bytes,
    rows_at,
    run_peaks,
    stretch_means,
    tokens_per_second,
    train_loss,
    value_at,
)
from fitune.report.run_on_disk import RecordedRun
from fitune.report.sources import read_recorded
from fitune.run.interval import ConfidenceInterval, differ, paired_interval

#: in nats: differences by rounding alone (bfloat16 sums in another order) are smaller, those by
#: another batch or another rate are not
SAME_LOSS = 0.02
SPEED_NOISE_FRACTION = 0.02
PEAK_NOISE_FRACTION = 0.01
MOST_STRETCHES = 20
#: the beginnings of settings that change how a step is computed or what is stored of it, but not
#: its result (batch.effective is compared by its value)
HOW_IT_IS_COMPUTED = (
    "batch.", "memory.", "run.", "eval.", "model.recompute", "model.attention", "loss",
    "data.packing", "train.save_every", "train.eval_every", "train.stop_after",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run of a comparison. Values that are unknown are None."""

    run: RecordedRun
    effective_batch: int | None
    #: samples of a micro-batch x micro-batches of a step, as text
    split: str
    lr: float | None
    #: the predicted reserved memory of a step
    predicted_bytes: int | None
    #: the reserved memory of the step that was predicted
    measured_bytes: int | None
    #: the largest memory of the whole run. Its kind is the same for all runs: reserved by PyTorch
    #: (on a CPU occupied by the process in addition to the program), if every run recorded that.
    run_peak_bytes: int | None
    tokens_per_second: float | None
    #: of training, up to the comparison's tokens
    seconds: float | None
    #: the mean over the last third of the comparison's tokens
    train_loss: float | None
    #: the loss on the held-out samples at the comparison's tokens
    eval_loss: float | None
    #: the difference to the first run
    train_difference: ConfidenceInterval | None
    #: the difference to the first run
    eval_difference: ConfidenceInterval | None
    #: no other run is at least as good in peak, loss and speed and better in one of them, where
    #: differences within the noise count as equal
    on_front: bool = False

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def peak_bytes(self) -> int | None:
        """The peak of the run, or its prediction if the run did not take place."""
        return self.run_peak_bytes if self.run_peak_bytes is not None else self.predicted_bytes

    @property
    def prediction_error(self) -> float | None:
        """The relative error: 0.1 if ten per cent more was predicted than measured."""
        if not self.predicted_bytes or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, slots=True)
class CurveCheck:
    """The distance between the losses of two runs that are the same training, computed in two ways.

    Two such runs differ only in settings that must not change the result.
    """

    first: str
    second: str
    #: the largest difference of their training losses, and the step where it is
    max_difference: float
    step: int
    #: the number of steps that both runs recorded
    num_steps: int

    @property
    def same(self) -> bool:
        return self.max_difference <= SAME_LOSS


@dataclass(frozen=True, slots=True)
class Comparison(HtmlDisplay):
    """Several runs, compared at equal tokens."""

    rows: tuple[ComparedRun, ...]
    #: the number of tokens at which losses are compared; None if a run did not count its tokens,
    #: and then losses are those at the end of each run
    tokens: float | None
    #: the settings that are not the same in all runs, with one value for each run
    differing: Mapping[str, tuple[object, ...]]
    checks: tuple[CurveCheck, ...]
    #: what limits the comparison, one message each
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """Return a summary in one line."""
        names = ", ".join(row.name for row in self.rows)
        place = "" if self.tokens is None else f" · {self.tokens:,.0f} tokens"
        return f"Comparison: {names}{place}"


@bounded("fitune.compare")
def compare(runs: Sequence[RecordedRun | Path | str], *, tokens: float | None = None) -> Comparison:
    """Compare runs at equal tokens; differences are to the first run.

    runs: recorded runs, or paths that `read_recorded` reads. A run that is given twice counts once.
    tokens: the number of tokens at which to compare; None for the most that every run has reached.

    Raises RunDirectoryError for a path without a run, and for tokens that a run has not reached.
    """
    found = list({run.path: run for run in _found(runs)}.values())
    if not found:
        raise RunDirectoryError("nothing to compare: give the directories of runs")
    found = _with_names(found)
    if tokens is not None and not tokens > 0:
        raise RunDirectoryError(
            f"{tokens:,.0f} tokens are no place to compare at: give more than 0 with --at"
        )
    reached = [
        float(run.evals["total_tokens"].max(initial=0)) or run.total_tokens
        for run in found
        if run.num_steps
    ]
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
    """Name runs by their directories where several have the same name."""
    names = [run.name for run in runs]
    shown = [run.path if names.count(run.name) > 1 else run.name for run in runs]
    return [replace(run, name=printable_line(name)) for run, name in zip(runs, shown, strict=True)]


def _row(
    run: RecordedRun, first: RecordedRun, place: float | None, *, peak_kind: str | None
) -> ComparedRun:
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
        seconds=value_at(run.train["total_tokens"], run.train["seconds"], place),
        train_loss=train_loss(run, place),
        eval_loss=eval_loss(run, place),
        train_difference=None if run is first else _train_interval(run, first, place),
        eval_difference=None if run is first else _eval_interval(run, first, place),
    )


def _common_peak(runs: Sequence[RecordedRun]) -> str | None:
    """Return the first kind of peak that all runs recorded, apart from those that recorded none."""
    known = [peaks for run in runs if (peaks := run_peaks(run))]
    return next((kind for kind in PEAKS if known and all(kind in peaks for peaks in known)), None)


def _train_interval(
    run: RecordedRun, first: RecordedRun, place: float | None
) -> ConfidenceInterval | None:
    """Return the interval of the difference of the training losses, paired by token stretches."""
    steps = [num_steps_in_window(each, place) for each in (run, first)]
    num_stretches = min(MOST_STRETCHES, *steps)
    one, other = (
        stretch_means(each, place, num_stretches=max(num_stretches, 1)) for each in (run, first)
    )
    return None if one is None or other is None else paired_interval(one, other, np.ones(len(one)))


def _paired_rows(
    run: RecordedRun, other: RecordedRun, place: float | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[float, ...]] | None:
    """Return the losses of both runs on each held-out sample, and the samples' weights.

    Returns None if the runs were not evaluated on the same samples.
    """
    one, two = rows_at(run, place), rows_at(other, place)
    return (one[0], two[0], one[1]) if one and two and one[1] == two[1] else None


def _eval_interval(
    run: RecordedRun, other: RecordedRun, place: float | None
) -> ConfidenceInterval | None:
    paired = _paired_rows(run, other, place)
    return None if paired is None else paired_interval(*paired)


def eval_interval(comparison: Comparison, first: str, second: str) -> ConfidenceInterval | None:
    """Return the difference of the eval losses of two runs of a comparison: first - second."""
    runs = {row.name: row.run for row in comparison.rows}
    return _eval_interval(runs[first], runs[second], comparison.tokens)


def differing_settings(runs: Sequence[RecordedRun]) -> Mapping[str, tuple[object, ...]]:
    """Return the settings that differ, without the names and the directories of the runs."""
    keys = sorted({key for run in runs for key in run.settings if not key.startswith("run.")})
    table = {key: tuple(run.settings.get(key) for run in runs) for key in keys}
    return {
        key: values for key, values in table.items() if any(value != values[0] for value in values)
    }


def _checks(runs: Sequence[RecordedRun]) -> Iterator[CurveCheck]:
    for first, second in combinations(runs, 2):
        if _same_training(first, second) and (check := _curve_check(first, second)) is not None:
            yield check


def _same_training(first: RecordedRun, second: RecordedRun) -> bool:
    """Return whether the runs differ only in settings that must not change the result."""
    if effective_batch(first) is None or effective_batch(first) != effective_batch(second):
        return False
    is_same_data = first.summary.get("data_hash") == second.summary.get("data_hash")
    if not (first.settings and second.settings) or not is_same_data:
        return False
    return all(key.startswith(HOW_IT_IS_COMPUTED) for key in differing_settings((first, second)))


def _curve_check(first: RecordedRun, second: RecordedRun) -> CurveCheck | None:
    steps, one, two = np.intersect1d(first.train["step"], second.train["step"], return_indices=True)
    differences = np.abs(first.train["loss"][one] - second.train["loss"][two])
    if not len(steps) or not np.isfinite(differences).all():
        return None
    worst = int(differences.argmax())
    return CurveCheck(
        first.name, second.name, float(differences[worst]), int(steps[worst]), len(steps)
    )


def _with_front(rows: Sequence[ComparedRun], place: float | None) -> tuple[ComparedRun, ...]:
    """Return the runs with `on_front` set for those on the Pareto front."""
    beaten = {
        two.name for one in rows for two in rows if one is not two and _beats(one, two, place)
    }
    known = [
        row
        for row in rows
        if row.run.num_steps and (row.eval_loss is not None or row.train_loss is not None)
    ]
    front = {row.name for row in known} - beaten or {row.name for row in known}
    return tuple(replace(row, on_front=row.name in front) for row in rows)


def _beats(one: ComparedRun, two: ComparedRun, place: float | None) -> bool:
    """Return whether `one` is better than `two` in peak, speed or loss, and worse in none of them.

    Differences within the noise, and values that one of them lacks, do not count.
    """
    signs = [
        _sign(one.peak_bytes, two.peak_bytes, PEAK_NOISE_FRACTION),
        -_sign(one.tokens_per_second, two.tokens_per_second, SPEED_NOISE_FRACTION),
        _loss_sign(one, two, place),
    ]
    return max(signs) <= 0 and min(signs) < 0


def _sign(one: float | None, two: float | None, noise_fraction: float) -> int:
    """Return -1 if `one` is less, 1 if it is more, 0 within the noise or if a value is unknown."""
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


def _notes(
    runs: Sequence[RecordedRun], place: float | None, *, peak_kind: str | None
) -> Iterator[str]:
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
        yield say(
            "not every run tells what was reserved: the peaks are of what all tell, {kind}",
            kind=peak_kind,
        )
    uncounted = [run.name for run in runs if run.num_steps and not np.isfinite(run.total_tokens)]
    if uncounted and len(runs) > 1:
        yield say(
            "{names}: tokens were not counted, so this is no comparison at equal tokens",
            names=", ".join(uncounted),
        )
    if len({run.summary.get("data_hash") for run in runs} - {None}) > 1:
        yield say("the runs were trained on different data")
    if len({(run.data or {}).get("held_out_hash") for run in runs} - {None}) > 1:
        yield say(
            "the runs were evaluated on different held-out samples: their eval losses cannot be compared"
        )
    if len({run.settings.get("train.seed") for run in runs} - {None}) > 1:
        yield say(
            "the runs have different seeds: the difference between seeds is in every difference shown"
        )
    elif len(runs) > 1 and any(run.eval_rows for run in runs):
        yield say(
            "an interval covers which samples were held out; another seed of training may differ by more"
        )
