"""What a run writes down: the journal, the metrics, the events and the summary."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fitune.allocator.prediction import Prediction
from fitune.batch_size.noise import noise_fields
from fitune.config import RunConfig, config_hash
from fitune.data.rows import Batch
from fitune.distributed.processes import Ranks
from fitune.machine.process_memory import MemoryPeak
from fitune.objectives.objective import Objective
from fitune.recovery.step import SafeResult
from fitune.run.answers import EvalAnswer
from fitune.run.directory import RunDirectory
from fitune.run.eval_rows import EvalRows, append_eval_rows
from fitune.run.journal import StepRecord, append_step, ids_hash
from fitune.run.metrics import EvalMetrics, RunEvent, Status, StepMetrics, Summary, summary_json
from fitune.run.patient_files import PatientFiles
from fitune.run.watcher import Watcher
from fitune.step.evaluate import EvalResult
from fitune.step.step import StepResult
from fitune.training.state import RunState

#: Events that concern one of several processes. All other events happen to all processes alike.
OWN_EVENTS = ("out_of_memory", "micro_batch")


class RunLog:
    """Writes a run's files and shows its events. Only the first process of several writes."""

    def __init__(self, run: RunDirectory, watcher: Watcher, ranks: Ranks) -> None:
        self._run, self._watcher, self._ranks = run, watcher, ranks
        self._unreported: list[tuple[str, str]] = []
        self.files = PatientFiles()

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        self._append(self._run.metrics, metrics)
        self._watcher.step(metrics, progress=progress)

    def evaluation(self, metrics: EvalMetrics, result: EvalResult) -> None:
        self._append(self._run.metrics, metrics)
        if self._ranks.leads:
            rows = _eval_rows(result, metrics)
            append_eval_rows(self._run.eval_rows, rows, append=self.files.append)

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes."""
        return self._ranks.leads

    def answer(self, line: EvalAnswer) -> None:
        self._append(self._run.answers, line)

    def journal(self, record: StepRecord, previous: str, **measured: float | None) -> str:
        """Append a step to the journal, and return its hash, which continues the hash `previous`.

        measured: the fields of a JournalLine that its hash does not cover.
        """
        path = self._run.journal if self._ranks.leads else None
        return append_step(path, previous, record, append=self.files.append, **measured)

    def event(self, kind: str, message: str, *, step: int) -> None:
        """Write and show an event of all processes."""
        event = RunEvent(time=time.time(), step=step, kind=kind, message=message)
        self._append(self._run.events, event)
        self._watcher.note(message)

    def defer(self, kind: str, message: str) -> None:
        """Remember an event of this process, which the first one logs after the step."""
        if kind in OWN_EVENTS:
            self._unreported.append((kind, f"rank {self._ranks.rank}: {message}"))

    def take_unreported(self) -> tuple[tuple[str, str], ...]:
        """Return the kind and message of each deferred event, once."""
        events = tuple(self._unreported)
        self._unreported.clear()
        return events

    def note(self, message: str) -> None:
        """Show a message without writing it."""
        self._watcher.note(message)

    def summary(self, summary: Summary) -> None:
        if self._ranks.leads:
            self.files.replace(self._run.summary, summary_json(summary))

    def _append(self, path: Path, line: StepMetrics | EvalMetrics | EvalAnswer | RunEvent) -> None:
        if self._ranks.leads:
            self.files.append(path, line)


def step_record(state: RunState, batch: Batch, safe: SafeResult, *, lr: float) -> StepRecord:
    """Describe a step for the journal. `state` is the one before the step."""
    result = safe.step
    has_target = result.loss is not None
    return StepRecord(
        step=state.step + has_target,
        position=state.position + len(batch.rows),
        ids_hash=ids_hash(batch.row_ids),
        loss_weight=result.loss_weight,
        plan=safe.plan,
        lr=lr,
        loss_sum=None if result.loss is None else result.loss * result.loss_weight,
        grad_norm=result.grad_norm,
        updated=result.updated,
        reliefs=safe.fallbacks if any(safe.fallbacks) else (),
    )


def step_metrics(
    state: RunState,
    batch: Batch,
    safe: SafeResult,
    *,
    lr: float,
    peak: MemoryPeak,
    seconds: float,
) -> StepMetrics:
    """Return the metrics of a step whose batch had a target. `state` is the one after the step."""
    result: StepResult = safe.step
    assert result.loss is not None
    assert result.grad_norm is not None
    # the noise is measured by loss weight, which is one a sample of preferences, and is told in tokens
    are_preferences = any(row.judged is not None for row in batch.rows)
    tokens_per_weight = batch.num_supervised_tokens / batch.loss_weight if are_preferences else 1.0
    return StepMetrics(
        step=state.step,
        tokens=batch.num_tokens,
        supervised_tokens=batch.num_supervised_tokens,
        total_tokens=state.tokens,
        loss=result.loss,
        lr=lr,
        grad_norm=result.grad_norm,
        seconds=seconds,
        tokens_per_second=batch.num_tokens / seconds,
        num_micro_batches=sum(map(bool, safe.plan)),
        micro_batch=max(map(len, safe.plan)),
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
        device_used_bytes=peak.device_bytes,
        **noise_fields(
            state.noise,
            state.preconditioned_noise,
            step_tokens=result.loss_weight,
            tokens_per_weight=tokens_per_weight,
        ),
    )


def with_means(metrics: StepMetrics, objective: Objective, result: StepResult) -> StepMetrics:
    """Return the metrics with what the objective adds to them; see `Objective.means`."""
    fields: dict[str, Any] = objective.step_metrics(result.means)
    return replace(metrics, **fields)


def run_summary(
    state: RunState,
    status: Status,
    config: RunConfig,
    *,
    data_hash: str,
    total_steps: int | None,
    predicted: Prediction | None,
) -> Summary:
    """Summarise a run.

    total_steps: None if the number of steps is not known in advance.
    predicted: the prediction of the second step, if there is one.
    """
    return Summary(
        status=status,
        steps=state.step,
        total_steps=total_steps,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds if state.tokens else None,
        train_loss=state.train_loss,
        eval_loss=state.eval_loss,
        best_eval_loss=state.best_eval_loss,
        predicted_allocated_bytes=None if predicted is None else predicted.peak_allocated_bytes,
        predicted_reserved_bytes=None if predicted is None else predicted.peak_reserved_bytes,
        measured_allocated_bytes=state.checked_allocated_bytes,
        measured_reserved_bytes=state.checked_reserved_bytes,
        measured_device_bytes=state.checked_device_bytes,
        peak_allocated_bytes=state.peak.allocated_bytes,
        peak_reserved_bytes=state.peak.reserved_bytes,
        peak_device_bytes=state.peak.device_bytes,
        num_ooms=state.num_ooms,
        num_retries=state.num_retries,
        micro_batch_changes=state.micro_batch_changes,
        effective_batch=config.batch.rows_per_step,
        config_hash=config_hash(config),
        data_hash=data_hash,
    )


def _eval_rows(result: EvalResult, metrics: EvalMetrics) -> EvalRows:
    pairs = zip(result.row_losses, result.row_weights, strict=True)
    losses = tuple(round(loss / weight, 6) if weight else 0.0 for loss, weight in pairs)
    return EvalRows(
        step=metrics.step,
        total_tokens=metrics.total_tokens,
        losses=losses,
        weights=result.row_weights,
    )
