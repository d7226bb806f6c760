"""The training loop: takes batches, does optimizer steps, evaluates in between, and saves.

A state is saved after a whole step, never within one. A first SIGINT or SIGTERM is noted, and the
run stops after the step; a second one ends the process at once.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.batch_size.growth import set_settings
from fitune.batch_size.noise import PRECONDITIONED_EVERY
from fitune.batch_size.norms import NormRecorder
from fitune.config import RunConfig
from fitune.data.batches import batches, prefetch
from fitune.data.rows import Batch, MicroBatch
from fitune.data.split_by_rank import split_by_rank
from fitune.distributed.processes import Ranks
from fitune.errors import FituneError, OutOfMemoryError, RunDirectoryError
from fitune.machine.process_memory import MemoryPeak, read_peak, reset_peak
from fitune.model.finite import saved_not_finite, weights_not_finite
from fitune.model.save import model_files
from fitune.recovery.guard import Guard
from fitune.recovery.step import SafeResult
from fitune.run.directory import RunDirectory
from fitune.run.metrics import EvalMetrics, Status, Summary
from fitune.run.watcher import Watcher
from fitune.step.assemble import Setup
from fitune.step.optimizer import set_lr
from fitune.step.schedule import lr_factor
from fitune.step.step import StepResult
from fitune.training.answers import PromptAnswers
from fitune.training.checkpoint.content import seed_everything
from fitune.training.checkpoint.write import CheckpointWriter
from fitune.training.growth import BatchGrowth
from fitune.training.identity import run_conditions, run_identity
from fitune.training.length import run_length, steps_between_evals
from fitune.training.log import RunLog, run_summary, step_metrics, step_record, with_means
from fitune.training.resume import Replay, Start, check_replayed, replayed_fallbacks, replayed_split
from fitune.training.samples import Data, micro_batches_of
from fitune.training.saving import Saver
from fitune.training.self_check import CHECKED_STEP, SelfCheck
from fitune.training.state import RunState, larger_peak
from fitune.units import parse_seconds

PREFETCHED_BATCHES = 2
MOST_BAD_STEPS = 3
#: A float16 loss scale of 2^16 reaches 1 after 16 halvings; more overflows in a row than this are
#: not caused by the scale.
MOST_OVERFLOWS = 30


@dataclass(frozen=True)
class _Report:
    """What a process reports to the others after each step."""

    #: the signal that it was sent
    signal: int | None
    #: whether train.stop_after has passed
    is_late: bool
    #: kind and message of each event that only this process had
    events: tuple[tuple[str, str], ...]
    #: since the run began
    peak: MemoryPeak
    #: the step of the last save if that failed
    failed_save: int | None


class TrainingLoop:
    """A run in progress: its parts and its state."""

    def __init__(
        self,
        config: RunConfig,
        setup: Setup,
        run: RunDirectory,
        *,
        data: Data,
        tokenizer: Tokenizer,
        watcher: Watcher,
        self_check: SelfCheck | None = None,
        start: Start | None = None,
        replay: Replay | None = None,
        ranks: Ranks | None = None,
        until: int | None = None,
    ) -> None:
        """Make the parts of a run.

        self_check: the prediction of the second step, to compare with the measured memory.
        start: where a resumed run continues; weights and random numbers are restored already.
        replay: the steps to repeat, and the results that they must have.
        ranks: the processes that train together, of which only the first one writes.
        until: the number of samples after which the run saves and stops, as after a signal.
        """
        ranks = ranks or Ranks()
        self.config, self.setup, self.run, self.data = config, setup, run, data
        self.watcher, self.self_check, self.start = watcher, self_check, start
        self.replay, self.ranks, self.until = replay, ranks, until
        self.log = RunLog(run, watcher, ranks)
        self.answers = PromptAnswers(config.eval, setup, self.log, data=data, tokenizer=tokenizer)
        self.device = next(setup.model.parameters()).device
        self.length = run_length(config.train, data.train, rows_per_step=config.batch.rows_per_step)
        self.state = RunState() if start is None else start.state
        self.guard = Guard(
            config,
            setup,
            examples=data.train,
            report=self.own_event,
            predicted=None if self_check is None else self_check.predicted,
            ranks=ranks,
        )
        self.growth = BatchGrowth(
            config,
            setup,
            length=self.length,
            supervised_fraction=data.train.weight_per_token,
        )
        if self.state.batch.optim is not None:
            set_settings(setup.optimizer, self.state.batch.optim)
            self.guard.set_clip(self.state.batch.optim.clip)
        self.started, self.num_replayed = time.perf_counter(), 0
        #: loss and step of the best evaluation before the one whose weights are being saved
        self.previous_best: tuple[float | None, int | None] = (None, None)
        every = steps_between_evals(self.length.total_steps)
        eval_every, save_every = config.train.eval_every, config.train.save_every
        self.eval_every = every if eval_every == "auto" else eval_every
        self.save_every = self.eval_every if save_every == "auto" else save_every
        writer = CheckpointWriter(
            run,
            setup,
            files=model_files(setup.model, tokenizer=tokenizer, ends=data.train.report.ends),
            facts={
                "identity": run_identity(config, setup, train=data.train, held_out=data.eval),
                "conditions": run_conditions(
                    setup, attention=config.model.attention, num_ranks=ranks.size
                ),
            },
            logs=self.log.files,
            writes=ranks.leads,
        )
        saved = self.state.commit if self.state.step > 0 else None
        self.saver = Saver(writer, self.log, ranks, saved=saved)

    def is_over(self) -> bool:
        if self.replay is not None and self.num_replayed == len(self.replay.lines):
            return True
        patience = self.config.eval.patience
        is_flat = patience is not None and self.state.worse_evals >= patience
        return is_flat or self.length.is_over(step=self.state.step, tokens=self.state.tokens)

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluation and saving, over all sessions of the run."""
        earlier = 0.0 if self.start is None else self.start.state.seconds
        return earlier + time.perf_counter() - self.started

    def begin(self) -> None:
        """Prepare the first step of this session."""
        if self.state == RunState():
            seed_everything(self.config.train.seed)
        for note in () if self.start is None else self.start.notes:
            self.event("resume", note)
        self.write_summary("running")
        self.guard.start()
        if self.start is not None and self.start.memory_model is not None:
            # after `start`, which measures sizes of its own
            self.guard.restore(self.start.memory_model)
        if self.is_evaluation_due():  # the run may have stopped before a due evaluation
            self.evaluate()
        self.guard.release_trial_memory()

    def run_to_the_end(self, caught: list[int]) -> Status:
        """Train until the run is over or stops. Signals are appended to `caught` meanwhile."""
        stop_after = self.config.train.stop_after
        stop_at = None if stop_after is None else self.started + parse_seconds(stop_after)
        self.begin()
        prepared = prefetch(self._prepared(), depth=PREFETCHED_BATCHES)
        try:
            while not self.is_over() and (item := next(prepared, None)) is not None:
                self.train_batch(*item)
                if self.grow():
                    prepared.close()  # type: ignore[attr-defined]
                    prepared = prefetch(self._prepared(), depth=PREFETCHED_BATCHES)
                self.saver.report(step=self.state.step)
                stops = self.agree_to_stop(caught, stop_at)
                if self.is_over():
                    break
                if stops:
                    self.save_last()
                    self.event(
                        "stopped", "interrupted" if caught else f"stopped after {stop_after}"
                    )
                    return "stopped"
                if self.is_evaluation_due():
                    self.evaluate()
                if self.state.step % self.save_every == 0:
                    self.save()
                if self.until is not None and self.state.position >= self.until:
                    self.save_last()
                    return "stopped"
        finally:
            prepared.close()  # type: ignore[attr-defined]
        self.evaluate()
        self.agree_to_stop([], None)
        self.save_last()
        return "finished"

    def agree_to_stop(self, caught: list[int], stop_at: float | None) -> bool:
        """Exchange the processes' reports, and return whether all of them stop after this step.

        They stop if any of them was sent a signal or has run out of time.
        """
        report = _Report(
            signal=next(iter(caught), None),
            is_late=stop_at is not None and time.perf_counter() >= stop_at,
            events=self.log.take_unreported(),
            peak=self.state.peak,
            failed_save=self.saver.failed_step,
        )
        reports = self.ranks.exchange(report)
        for each in reports:
            for kind, message in each.events:
                self.event(kind, message)
            self.state = replace(self.state, peak=larger_peak(self.state.peak, each.peak))
        best_step = self.state.best_step
        if reports[0].failed_save == best_step and best_step not in (None, self.state.step):
            # the save of the best weights failed, so best/ still has the previous ones
            loss, step = self.previous_best
            self.state = replace(self.state, best_eval_loss=loss, best_step=step)
        signals = [each.signal for each in reports if each.signal is not None]
        if not caught:
            caught += signals[:1]
        # not by `caught`: a signal that arrived during the exchange is not known to the others yet
        return bool(signals) or any(each.is_late for each in reports)

    def _prepared(self) -> Iterator[tuple[Batch, list[MicroBatch]]]:
        """Yield the next batches, each with the micro-batches of this process."""
        following = batches(
            self.data.train,
            rows_per_step=self.growth.num_samples(self.state),
            seed=self.config.train.seed,
            position=self.state.position,
            epochs=self.length.epochs,
        )
        layout, ranks = self.setup.layout, self.ranks
        if self.replay is not None:
            lines = self.replay.lines[self.num_replayed :]
            for batch, line in zip(following, lines, strict=False):
                yield batch, replayed_split(batch, line, packed=layout.packed, ranks=ranks)
            return
        for batch in following:
            yield batch, layout.split(split_by_rank(batch, ranks.size)[ranks.rank])

    def train_batch(self, batch: Batch, micro_batches: list[MicroBatch]) -> None:
        state, setup = self.state, self.setup
        tokens = state.tokens + batch.num_tokens
        progress = self.length.progress(step=state.step + 1, tokens=tokens)
        before = self.length.progress(step=state.step, tokens=state.tokens)
        lr = self.growth.optim(state).lr * lr_factor(self.config.optim, (before + progress) / 2)
        set_lr(setup.optimizer, lr)
        shards = setup.settings.shards
        # Adam's second moments, which precondition the norms, are zero before its first update
        is_preconditioned = state.step > 0 and state.step % PRECONDITIONED_EVERY == 0
        norms = NormRecorder(setup.optimizer, preconditioned=is_preconditioned, shards=shards)
        start = time.perf_counter()
        keep_plan = self.replay is not None
        if self.replay is not None:
            self.guard.apply_fallbacks(
                replayed_fallbacks(self.replay, self.num_replayed, rank=self.ranks.rank)
            )
        with self.saved_if_out_of_memory():
            safe = self.guard.train(
                batch, micro_batches, step=state.step + 1, keep_plan=keep_plan, norms=norms
            )
        result, seconds = safe.step, time.perf_counter() - start
        peak = read_peak(self.device)
        if self.self_check is not None:
            peak = self.self_check.measured(peak)
        self.journal(batch, safe, lr=lr, peak=peak, seconds=seconds)
        if result.loss is None or result.grad_norm is None:
            self.event(
                "no_target", f"samples {batch.row_ids} have no supervised token: no update, no step"
            )
            return
        state = self.state
        self.state = state = replace(
            self.growth.with_noise(state, result),
            supervised_tokens=state.supervised_tokens + batch.num_supervised_tokens,
            train_loss=result.loss,
            bad_steps=0 if result.updated else state.bad_steps + 1,
            peak=larger_peak(state.peak, peak),
        )
        metrics = step_metrics(state, batch, safe, lr=lr, peak=peak, seconds=seconds)
        self.log.step(with_means(metrics, setup.settings.objective, result), progress=progress)
        if not result.updated:
            self.check_update(result)
        self.check_memory(peak)

    def journal(
        self, batch: Batch, safe: SafeResult, *, lr: float, peak: MemoryPeak, seconds: float
    ) -> None:
        """Write the step to the journal, and advance the counters of the state."""
        state = self.state
        record = step_record(state, batch, safe, lr=lr)
        if self.replay is not None:
            check_replayed(self.replay, self.num_replayed, record)
            self.num_replayed += 1
        journal_hash = self.log.journal(
            record,
            state.journal_hash,
            attempts=1 + len(safe.failures),
            peak_bytes=peak.device_bytes,
            free_bytes=self.guard.free_bytes,
            seconds=seconds,
        )
        self.state = replace(
            state,
            step=record.step,
            position=record.position,
            tokens=state.tokens + batch.num_tokens,
            journal_hash=journal_hash,
            num_retries=state.num_retries + bool(safe.failures),
            micro_batch_changes=self.guard.memory.num_changes,
        )

    def check_memory(self, peak: MemoryPeak) -> None:
        """Compare the measured memory of the second step with its prediction."""
        check = self.self_check
        if check is None or self.state.step != CHECKED_STEP or not self.guard.is_as_planned:
            return
        self.state = replace(
            self.state,
            checked_allocated_bytes=peak.allocated_bytes,
            checked_reserved_bytes=peak.reserved_bytes,
            checked_device_bytes=peak.device_bytes,
        )
        check.keep(peak)
        message, agrees = check.compare(peak)
        self.event("memory_check" if agrees else "memory_differs", message)

    def grow(self) -> bool:
        """Enlarge the effective batch if train.batch_mode decides so, and return whether it did."""
        decision = self.growth.decide(self.state)
        if decision is None:
            return False
        change, now = decision
        before = self.growth.num_samples(self.state)
        # the checkpoint being written must hold the optimizer's state before the change
        self.saver.wait()
        self.state = self.growth.apply(self.state, change, now)
        self.guard.set_clip(self.growth.optim(self.state).clip)
        after = self.growth.num_samples(self.state)
        self.event("batch", f"effective batch {before} -> {after} samples, {change.reason}")
        return True

    @contextmanager
    def saved_if_out_of_memory(self) -> Iterator[None]:
        """Save the trained weights before an OutOfMemoryError ends the run, and say where."""
        try:
            yield
        except OutOfMemoryError as error:
            if self.state.step == 0:
                raise
            where = f"the weights of step {self.state.step} are in {self.run.last}"
            try:
                self.save_last()
            except RunDirectoryError as failure:
                where = str(failure)
            raise OutOfMemoryError(f"{error}; {where}") from error

    def check_update(self, result: StepResult) -> None:
        """Log a step without an update; raise FituneError after too many of them in a row."""
        state, uses_scaler = self.state, self.setup.scaler is not None
        loss = f"{result.loss:.4g}"
        if uses_scaler:
            message = f"step {state.step}: the float16 gradient overflowed, the scale is lowered"
            self.event("overflow", message)
        else:
            norm = f"{result.grad_norm:.4g}"
            message = f"step {state.step}: loss {loss}, gradient norm {norm}: no update"
            self.event("not_finite", message)
        if state.bad_steps < (MOST_OVERFLOWS if uses_scaler else MOST_BAD_STEPS):
            return
        what = f"the gradient was not finite in {state.bad_steps} steps in a row (loss {loss} at step {state.step})"
        names = self.ranks.exchange(weights_not_finite(self.setup.model))
        if (name := next(filter(None, names), None)) is not None:
            raise FituneError(
                f"{what}, since {name} is not finite itself: an earlier update was too large, lower optim.lr "
                f"({self.setup.peak_lr:g}); {self.what_is_saved()}"
            )
        self.save_last()
        raise FituneError(
            f"{what}: lower optim.lr ({self.setup.peak_lr:g}) or look at the samples of these steps; the weights "
            f"before them are in {self.run.last}"
        )

    def what_is_saved(self) -> str:
        """Return a clause that names the directory with finite weights, if there is one."""
        self.saver.report(step=self.state.step, wait=True)
        for directory in (self.run.last, self.run.best):
            if saved_not_finite(directory) is None:
                return f"the weights of an earlier step are in {directory}"
        return "no weights were saved before that"

    def is_evaluation_due(self) -> bool:
        return self.state.step % self.eval_every == 0

    def evaluate(self) -> None:
        """Evaluate the present weights if that is not done yet; save them if they are the best."""
        if not len(self.data.eval) or self.state.evaluated_step == self.state.step:
            return
        reset_peak(self.device)
        start = time.perf_counter()
        own_samples = range(self.ranks.rank, len(self.data.eval), self.ranks.size)
        rows_at_once = self.config.batch.rows_per_step
        micro_batches = micro_batches_of(
            self.data.eval, own_samples, self.setup.eval_layout, rows_at_once=rows_at_once
        )
        with self.saved_if_out_of_memory():
            result = self.guard.evaluate(micro_batches)
        state, peak = self.state, read_peak(self.device)
        metrics = EvalMetrics(
            step=state.step,
            total_tokens=state.tokens,
            eval_loss=result.loss,
            eval_tokens=result.num_supervised_tokens,
            seconds=time.perf_counter() - start,
            peak_allocated_bytes=peak.allocated_bytes,
            **self.setup.settings.objective.metrics(
                result.loss,
                result.totals,
                loss_weight=result.loss_weight,
                num_targets=result.num_supervised_tokens,
            ),
        )
        self.log.evaluation(metrics, result)
        self.answers.ask(state)
        # neither the untrained model nor a loss that is not a number is a result of this run
        better = state.best_eval_loss is None or result.loss < state.best_eval_loss
        best = state.step > 0 and better and math.isfinite(result.loss)
        state_after = state.evaluated(result.loss, is_best=best)
        # read again, with the answers
        self.state = replace(state_after, peak=larger_peak(state.peak, read_peak(self.device)))
        if best:
            self.previous_best = (state.best_eval_loss, state.best_step)
            self.save()
        self.watcher.evaluation(metrics, best=best)
        if self.state.worse_evals == self.config.eval.patience:
            self.event(
                "early_stop", "the evaluations of eval.patience were no better: the run ends"
            )

    def save(self) -> None:
        """Begin to save the present state as last/ (and best/), unless that is done already."""
        if self.saver.is_saved(self.state):
            return
        self.saver.report(step=self.state.step, wait=True)
        if self.setup.settings.shards is None:  # otherwise each process has its own shard
            self.ranks.check_same(
                parameter for parameter in self.setup.model.parameters() if parameter.requires_grad
            )
        self.state = replace(self.state, seconds=self.seconds)
        self.saver.begin(self.state, memory_model=self.guard.to_json())
        self.write_summary("running")

    def save_last(self) -> None:
        """Save the present state and wait for it; see `Saver.save_last`."""
        self.saver.save_last(self.save, step=self.state.step)

    def own_event(self, kind: str, message: str) -> None:
        """Log an event of this process: at once in the first one, after the step in the others."""
        if self.ranks.leads:
            self.event(kind, message)
        else:
            self.log.defer(kind, message)

    def event(self, kind: str, message: str) -> None:
        """Log an event that all processes have."""
        self.log.event(kind, message, step=self.state.step)
        if kind == "out_of_memory":
            self.state = replace(self.state, num_ooms=self.state.num_ooms + 1)

    def write_summary(self, status: Status) -> Summary:
        # the number of steps is an estimate if tokens end the run or the batch may grow
        config = self.config
        is_exact = self.length.tokens is None and config.train.batch_mode == "advise"
        summary = run_summary(
            replace(self.state, seconds=self.seconds),
            status,
            config,
            data_hash=self.data.train.data_hash,
            total_steps=self.length.total_steps if is_exact else None,
            predicted=None if self.self_check is None else self.self_check.predicted,
        )
        self.log.summary(summary)
        return summary
