"""Lists the runs of a directory with what matters of each, also of those that are going on."""

from dataclasses import dataclass

from fitune.run.directory import RunRecord
from fitune.run.follow import RunFollower, RunView
from fitune.run.metrics import Summary
from fitune.run.progress import progress_fraction, seconds_left

#: of the metrics of a run that is going on: a few hundred steps
_TAIL_BYTES = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """One run of a list; what is unknown is None."""

    record: RunRecord
    steps: int | None
    train_loss: float | None
    eval_loss: float | None
    peak_bytes: int | None
    tokens_per_second: float | None
    #: between 0 and 1, and the remaining time; of a run that is going on
    progress_fraction: float | None = None
    seconds_left: float | None = None


def list_run(record: RunRecord) -> ListedRun:
    """Read what a list shows of a run."""
    summary = record.summary or Summary()
    # The summary of such a run is as old as its last save.
    if record.state in ("running", "crashed"):
        view = RunFollower(record.run, tail_bytes=_TAIL_BYTES).read()
        if view.steps:
            return _unsaved(view, summary)
    return ListedRun(
        record=record,
        steps=summary.steps if record.summary else None,
        train_loss=summary.train_loss,
        eval_loss=summary.eval_loss,
        peak_bytes=summary.peak_bytes,
        tokens_per_second=summary.tokens_per_second,
    )


def _unsaved(view: RunView, summary: Summary) -> ListedRun:
    """Return a run whose metrics are newer than its summary."""
    record, last = view.record, view.steps[-1]
    is_on = record.state == "running"
    return ListedRun(
        record=record,
        steps=last.step,
        train_loss=last.loss,
        eval_loss=view.evals[-1].eval_loss if view.evals else summary.eval_loss,
        peak_bytes=_peak_bytes(view, summary),
        tokens_per_second=last.tokens_per_second
        if is_on
        else summary.tokens_per_second or last.tokens_per_second,
        progress_fraction=progress_fraction(record, last.step, view.samples) if is_on else None,
        seconds_left=seconds_left(record, view.samples),
    )


def _peak_bytes(view: RunView, summary: Summary) -> int | None:
    """Return the peak memory up to the last step, defined like `Summary.peak_bytes`."""
    reserved = (summary.peak_reserved_bytes, *(step.peak_reserved_bytes for step in view.steps))
    device = (summary.peak_device_bytes, *(step.device_used_bytes for step in view.steps))
    return max(filter(None, reserved), default=None) or max(filter(None, device), default=None)
