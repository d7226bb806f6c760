"""The run: batches in, optimizer steps out, evaluation between them, and everything written to the run directory.

What is saved is saved after a whole step (a commit), never within one. An interrupt is noted and acted upon at the next
commit; a second one ends the process at once.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.batch_size.growth import (
    FLAT_EVALS,
    Situation,
    changed,
    decide,
    is_flat,
    rescale_memory,
    set_settings,
    switch_settings,
)
from fitune.batch_size.noise import (
    FEWEST_HALF_LIFE_STEPS,
    HALF_LIFE_FRACTION,
    PRECONDITIONED_EVERY,
    estimate,
    noise_fields,
    observe,
    observe_preconditioned,
)
from fitune.batch_size.norms import NormRecorder
from fitune.batch_size.scaling import OptimSettings
from fitune.config import RunConfig, config_hash
from fitune.data.batches import Epochs, batches, num_steps, prefetch
from fitune.data.deal import deal
from fitune.data.examples import Examples
from fitune.data.rows import Batch, MicroBatch
from fitune.distributed.processes import Ranks
from fitune.errors import ConfigError, FituneError, InterruptedRunError, OutOfMemoryError, RunDirectoryError
from fitune.machine.out_of_memory import memory_failure, said_of
from fitune.machine.process_memory import MemoryPeak, read_peak, reset_peak
from fitune.model.finite import saved_not_finite, weights_not_finite
from fitune.model.save import model_files
from fitune.recovery.guard import Guard
from fitune.recovery.step import SafeResult
from fitune.run.directory import RunDirectory
from fitune.run.eval_rows import EvalRows, append_eval_rows
from fitune.run.journal import StepRecord, append_step, ids_hash
from fitune.run.metrics import EvalMetrics, RunEvent, Status, StepMetrics, Summary, summary_json
from fitune.run.patient_files import PatientFiles
from fitune.run.watcher import Watcher
from fitune.step.assemble import Layout, Setup
from fitune.step.evaluate import EvalResult
from fitune.step.optimizer import set_lr
from fitune.step.schedule import lr_factor
from fitune.step.step import StepResult
from fitune.training.checkpoint import CheckpointWriter, seed_everything
from fitune.training.identity import run_conditions, run_identity
from fitune.training.resume import Replay, Start, check_replayed, replayed_reliefs, replayed_split
from fitune.training.self_check import CHECKED_STEP, SelfCheck
from fitune.training.state import RunState, larger_peak
from fitune.units import parse_seconds

EVALS_PER_RUN = 10
PREFETCHED_BATCHES = 2
MOST_BAD_STEPS = 3
LAST_SAVE_SECONDS = 20.0
"""So long the last save of a run is tried again, and what waits to be written: what cannot be saved then is lost."""
SAVE_AGAIN_SECONDS = 1.0
OWN_EVENTS = ("out_of_memory", "micro_batch")
"""What happens to one of several processes; all else they do together."""
MOST_OVERFLOWS = 30
"""A float16 scale of 2^16 needs 16 halvings to reach 1; more overflows in a row are no matter of scale."""


@dataclass(frozen=True)
class Data:
    train: Examples
    eval: Examples


@dataclass(frozen=True)
class _Word:
    """What a process tells the others after each step. signal: that it was sent. is_late: its time is up. events: that
    the others had not. peak: since the run began. failed_save: the step of the last save where that failed."""

    signal: int | None
    is_late: bool
    events: tuple[tuple[str, str], ...]
    peak: MemoryPeak
    failed_save: int | None


@dataclass(frozen=True)
class Length:
    """How long the run is: one of them. None: not limited by it."""

    epochs: float | None
    steps: int | None
    tokens: int | None
    total_tokens: int
    total_steps: int

    def progress(self, *, step: int, tokens: int) -> float:
        """The share (0 to 1) that is done after `step` steps with `tokens` tokens in all."""
        done = step / self.steps if self.steps is not None else tokens / self.total_tokens
        return min(done, 1.0)

    def is_over(self, *, step: int, tokens: int) -> bool:
        return (self.steps is not None and step >= self.steps) or (self.tokens is not None and tokens >= self.tokens)


def run_length(config: RunConfig, examples: Examples) -> Length:
    """In epochs, steps or tokens as configured, one epoch where nothing is said; the other measures are estimates.
    Raises ConfigError for a run without a sample."""
    train, rows_per_step = config.train, config.batch.rows_per_step
    epoch_tokens = int((examples.lengths * examples.repeats.astype("float64")).sum())
    epoch_steps = num_steps(examples, rows_per_step=rows_per_step)
    if train.steps is not None:
        return Length(None, train.steps, None, epoch_tokens * train.steps // max(epoch_steps, 1), train.steps)
    if train.tokens is not None:
        return Length(None, None, train.tokens, train.tokens, -(-train.tokens * epoch_steps // max(epoch_tokens, 1)))
    epochs = train.epochs or 1.0
    lengths = Epochs.of(examples.repeats)
    samples = lengths.num_samples(epochs)
    if not samples:
        mean = float(lengths.mean_samples)
        raise ConfigError(
            [
                f"train.epochs {epochs:g} of {mean:g} samples an epoch is not one sample: set it to "
                f"{math.ceil(100 / mean) / 100:g} or more, or give train.steps"
            ]
        )
    steps = num_steps(examples, rows_per_step=rows_per_step, epochs=epochs)
    return Length(epochs, None, None, max(round(epoch_tokens * samples / lengths.mean_samples), 1), steps)


def train(
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
) -> Summary:
    """Train to the end. self_check: the prediction of the second step, which is compared with what it took. start:
    where a run goes on, whose weights and random numbers are there already. replay: the steps to do, and what must
    come out. ranks: the processes that train together, each of which calls this; the first alone writes. until: samples
    after which the run stops, saved as by a signal.

    Raises InterruptedRunError after a signal, FituneError when the loss stays not finite or a replay differs,
    RunDirectoryError where the end cannot be saved; the weights of the last commit are in `run.last` in every case."""
    ranks = ranks or Ranks()
    trainer = _Trainer(config, setup, run, data, tokenizer, watcher, self_check, start, replay, ranks, until)
    status: Status = "failed"
    patience = 0.0
    try:
        with _noted_signals() as caught:
            status = trainer.run_to_the_end(caught)
        patience = LAST_SAVE_SECONDS
    except KeyboardInterrupt:
        status = "stopped"
        trainer.event("stopped", "interrupted at once, without saving")
        raise
    except Exception as error:
        if memory_failure(error) is None:
            raise
        raise OutOfMemoryError(
            f"{said_of(error)} beside the steps: close other programs; fitune train --resume {run.path} goes on from "
            "the last checkpoint"
        ) from error
    finally:
        trainer.writer.close()  # in any case: nothing is written once the run's lock is given back
        summary = trainer.write_summary(status)
        lost = trainer.files.close(patience=patience)
        if lost is not None:
            watcher.note(f"warning: {lost}")
    if lost is not None:
        raise RunDirectoryError(f"{lost}; the weights of step {summary.steps} are in {run.last}")
    if caught and status == "stopped":
        where = f"saved after step {summary.steps} in {run.last}"
        interrupted = InterruptedRunError(f"interrupted: {where}; fitune train --resume {run.path} goes on")
        interrupted.exit_code = 128 + caught[0]
        raise interrupted
    return summary


class _Trainer:
    """What a run needs, its state, and what is done with it; lives as long as `train`."""

    def __init__(
        self,
        config: RunConfig,
        setup: Setup,
        run: RunDirectory,
        data: Data,
        tokenizer: Tokenizer,
        watcher: Watcher,
        self_check: SelfCheck | None,
        start: Start | None,
        replay: Replay | None,
        ranks: Ranks,
        until: int | None,
    ) -> None:
        self.ranks, self.untold, self.files = ranks, list[tuple[str, str]](), PatientFiles()
        self.config, self.setup, self.run, self.data = config, setup, run, data
        self.watcher, self.self_check, self.start, self.replay, self.until = watcher, self_check, start, replay, until
        self.device = next(setup.model.parameters()).device
        self.length = run_length(config, data.train)
        self.state = RunState() if start is None else start.state
        self.saved = None if start is None or start.state.step == 0 else self.commit
        self.guard = Guard(
            config,
            setup,
            examples=data.train,
            tell=self.own_event,
            predicted=None if self_check is None else self_check.predicted,
            ranks=ranks,
        )
        if self.state.batch.optim is not None:
            self.set_optim(self.state.batch.optim)
        self.supervised_tokens = max(self.length.total_tokens * data.train.report.supervised_fraction, 1.0)
        self.started = time.perf_counter()
        self.num_replayed = 0
        self.best_before: dict[str, Any] = {}
        every = max(1, self.length.total_steps // EVALS_PER_RUN)
        self.eval_every = every if config.train.eval_every == "auto" else config.train.eval_every
        self.save_every = self.eval_every if config.train.save_every == "auto" else config.train.save_every
        self.writer = CheckpointWriter(
            run,
            setup,
            files=model_files(setup.model, tokenizer=tokenizer, ends=data.train.report.ends),
            facts={
                "identity": run_identity(config, setup, train=data.train, held_out=data.eval),
                "conditions": run_conditions(config, setup, num_ranks=ranks.size),
            },
            logs=self.files,
            writes=ranks.leads,
        )

    @property
    def commit(self) -> tuple[int, int]:
        """What tells two states of a run apart that are worth a checkpoint: a step, before and after its evaluation."""
        return self.state.step, self.state.evaluated_step

    @property
    def rows_per_step(self) -> int:
        return self.config.batch.rows_per_step * self.state.batch.growth

    @property
    def step_tokens(self) -> float:
        """Supervised tokens of an effective batch, on average."""
        configured = self.supervised_tokens / max(self.length.total_steps, 1)
        return configured * self.state.batch.growth

    @property
    def optim(self) -> OptimSettings:
        return self.state.batch.optim or self.setup.optim

    def set_optim(self, optim: OptimSettings) -> None:
        set_settings(self.setup.optimizer, optim)
        self.guard.set_clip(optim.clip)

    @property
    def half_life_tokens(self) -> float:
        return max(HALF_LIFE_FRACTION * self.supervised_tokens, FEWEST_HALF_LIFE_STEPS * self.step_tokens)

    def is_over(self) -> bool:
        if self.replay is not None and self.num_replayed == len(self.replay.lines):
            return True
        return self.length.is_over(step=self.state.step, tokens=self.state.tokens)

    @property
    def seconds(self) -> float:
        """At work, over all sessions."""
        earlier = 0.0 if self.start is None else self.start.state.seconds
        return earlier + time.perf_counter() - self.started

    def run_to_the_end(self, caught: list[int]) -> Status:
        stop_at = None
        if self.config.train.stop_after is not None:
            stop_at = self.started + parse_seconds(self.config.train.stop_after)
        if self.state == RunState():
            seed_everything(self.config.train.seed)
        for note in () if self.start is None else self.start.notes:
            self.event("resume", note)
        self.write_summary("running")
        self.guard.start()
        if self.start is not None and self.start.memory_model is not None:
            self.guard.restore(self.start.memory_model)  # after the start, which has learned something of its own
        if self.state.step % self.eval_every == 0:  # also one that was due when the run was stopped or ended
            self.evaluate()
        self.guard.settle()
        prepared = prefetch(self._prepared(), depth=PREFETCHED_BATCHES)
        try:
            while not self.is_over() and (item := next(prepared, None)) is not None:
                self.train_batch(*item)
                if self.grow():
                    prepared.close()  # type: ignore[attr-defined]
                    prepared = prefetch(self._prepared(), depth=PREFETCHED_BATCHES)
                self.tell_failed_save()
                stops = self.agree_to_stop(caught, stop_at)
                if self.is_over():
                    break
                if stops:
                    self.save_for_good()
                    self.event("stopped", "interrupted" if caught else f"stopped after {self.config.train.stop_after}")
                    return "stopped"
                if self.state.step % self.eval_every == 0:
                    self.evaluate()
                if self.state.step % self.save_every == 0:
                    self.save()
                if self.until is not None and self.state.position >= self.until:
                    self.save_for_good()
                    return "stopped"
        finally:
            prepared.close()  # type: ignore[attr-defined]
        self.evaluate()
        self.agree_to_stop([], None)
        self.save_for_good()
        return "finished"

    def agree_to_stop(self, caught: list[int], stop_at: float | None) -> bool:
        """Whether all processes stop here, since one was sent a signal or its time is up. What each has to tell is
        told."""
        is_late = stop_at is not None and time.perf_counter() >= stop_at
        own = _Word(next(iter(caught), None), is_late, tuple(self.untold), self.state.peak, self.writer.failed_step)
        self.untold.clear()
        words = self.ranks.exchange(own)
        for word in words:
            for kind, message in word.events:
                self.event(kind, message)
            self.state = replace(self.state, peak=larger_peak(self.state.peak, word.peak))
        if words[0].failed_save == self.state.best_step and self.state.best_step not in (None, self.state.step):
            self.state = replace(self.state, **self.best_before)  # best/ is still that
        signals = [word.signal for word in words if word.signal is not None]
        if not caught:
            caught += signals[:1]
        # by what all have heard: a signal that came meanwhile is told the next time
        return bool(signals) or any(word.is_late for word in words)

    def _prepared(self) -> Iterator[tuple[Batch, list[MicroBatch]]]:
        following = batches(
            self.data.train,
            rows_per_step=self.rows_per_step,
            seed=self.config.train.seed,
            position=self.state.position,
            epochs=self.length.epochs,
        )
        if self.replay is not None:
            for batch, line in zip(following, self.replay.lines[self.num_replayed :], strict=False):
                yield batch, replayed_split(batch, line, packed=self.setup.layout.packed, ranks=self.ranks)
            return
        for batch in following:
            yield batch, self.setup.layout.split(deal(batch, self.ranks.size)[self.ranks.rank])

    def train_batch(self, batch: Batch, micro_batches: list[MicroBatch]) -> None:
        state, setup = self.state, self.setup
        tokens = state.tokens + batch.num_tokens
        progress = self.length.progress(step=state.step + 1, tokens=tokens)
        before = self.length.progress(step=state.step, tokens=state.tokens)
        lr = self.optim.lr * lr_factor(self.config.optim, (before + progress) / 2)
        set_lr(setup.optimizer, lr)
        shards = setup.settings.shards
        # before Adam's first update there is nothing to weigh by
        weighs = state.step > 0 and state.step % PRECONDITIONED_EVERY == 0
        norms = NormRecorder(setup.optimizer, preconditioned=weighs, shards=shards)
        start = time.perf_counter()
        keep_plan = self.replay is not None
        if self.replay is not None:
            self.guard.apply_fallbacks(replayed_reliefs(self.replay, self.num_replayed, rank=self.ranks.rank))
        with self.saved_before_it_ends():
            safe = self.guard.train(batch, micro_batches, step=state.step + 1, keep_plan=keep_plan, norms=norms)
        result, seconds = safe.step, time.perf_counter() - start
        peak = read_peak(self.device)
        if self.self_check is not None:
            peak = self.self_check.measured(peak)
        state = self.journal(batch, safe, lr=lr, peak=peak, seconds=seconds)
        if result.loss is None or result.grad_norm is None:
            self.event("no_target", f"samples {batch.row_ids} have no supervised token: no update, no step")
            return
        self.state = state = replace(
            state,
            supervised_tokens=state.supervised_tokens + batch.num_supervised_tokens,
            train_loss=result.loss,
            bad_steps=0 if result.updated else state.bad_steps + 1,
            peak=larger_peak(state.peak, peak),
            **self.observed_noise(result),
        )
        metrics = StepMetrics(
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
            **noise_fields(state.noise, state.preconditioned_noise, step_tokens=result.loss_weight),
        )
        self.write(self.run.metrics, metrics)
        self.watcher.step(metrics, progress=progress)
        if not result.updated:
            self.check_update(result)
        self.check_memory(peak)

    def journal(self, batch: Batch, safe: SafeResult, *, lr: float, peak: MemoryPeak, seconds: float) -> RunState:
        """Writes the batch's line; the state behind it, which is the present one from now on."""
        state, result = self.state, safe.step
        has_target = result.loss is not None
        record = StepRecord(
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
        if self.replay is not None:
            check_replayed(self.replay, self.num_replayed, record)
            self.num_replayed += 1
        link = append_step(
            self.run.journal if self.ranks.leads else None,
            state.journal_hash,
            record,
            append=self.files.append,
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
            journal_hash=link,
            num_retries=state.num_retries + bool(safe.failures),
            micro_batch_changes=self.guard.memory.num_changes,
        )
        return self.state

    def check_memory(self, peak: MemoryPeak) -> None:
        """After the step that was predicted: its prediction beside what it took."""
        if self.self_check is None or self.state.step != CHECKED_STEP or not self.guard.is_as_planned:
            return
        self.state = replace(
            self.state,
            checked_allocated_bytes=peak.allocated_bytes,
            checked_reserved_bytes=peak.reserved_bytes,
            checked_device_bytes=peak.device_bytes,
        )
        self.self_check.keep(peak)
        sentence, agrees = self.self_check.compare(peak)
        self.event("memory_check" if agrees else "memory_differs", sentence)

    def observed_noise(self, result: StepResult) -> dict[str, Any]:
        """What the state's averages are after this step."""
        if result.norms is None or not result.updated:
            return {}
        half_life = self.half_life_tokens
        beta1 = self.optim.betas[0]
        noise = observe(self.state.noise, result.norms, half_life_tokens=half_life, beta1=beta1, clip=self.optim.clip)
        preconditioned = observe_preconditioned(
            self.state.preconditioned_noise, result.norms, half_life_tokens=half_life
        )
        return {"noise": noise, "preconditioned_noise": preconditioned}

    def grow(self) -> bool:
        """Whether the effective batch is larger from the next step on."""
        state = self.state
        progress = self.length.progress(step=state.step, tokens=state.tokens)
        now = Situation(
            tokens=progress * self.supervised_tokens,
            total_tokens=self.supervised_tokens,
            step_tokens=self.step_tokens,
            half_life_tokens=self.half_life_tokens,
            warmup_fraction=self.config.optim.warmup,
            schedule=lr_factor(self.config.optim, progress),
            noise=estimate(state.noise),
            flat=is_flat(state.eval_losses),
        )
        change = decide(self.config.train.batch_mode, state.batch, now)
        if change is None:
            return False
        before = self.rows_per_step
        optim = switch_settings(self.optim, change, steps_left=now.steps_left)
        self.writer.wait()  # what is being saved is the state before the change
        rescale_memory(self.setup.optimizer, gain=change.gain)
        self.set_optim(optim)
        self.state = replace(state, batch=changed(state.batch, now, optim), eval_losses=())
        self.event("batch", f"effective batch {before} -> {self.rows_per_step} samples, {change.reason}")
        return True

    @contextmanager
    def saved_before_it_ends(self) -> Iterator[None]:
        """Of running out of memory for good: what was trained so far is saved."""
        try:
            yield
        except OutOfMemoryError as error:
            if self.state.step == 0:
                raise
            where = f"the weights of step {self.state.step} are in {self.run.last}"
            try:
                self.save_for_good()
            except RunDirectoryError as failure:
                where = str(failure)
            raise OutOfMemoryError(f"{error}; {where}") from error

    def check_update(self, result: StepResult) -> None:
        """Of a step without an update."""
        state = self.state
        if self.setup.scaler is not None:
            self.event("overflow", f"step {state.step}: the float16 gradient overflowed, the scale is lowered")
        else:
            self.event(
                "not_finite",
                f"step {state.step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}: no update",
            )
        if state.bad_steps >= (MOST_BAD_STEPS if self.setup.scaler is None else MOST_OVERFLOWS):
            loss = f"{result.loss:.4g}"
            what = f"the gradient was not finite in {state.bad_steps} steps in a row (loss {loss} at step {state.step})"
            names = self.ranks.exchange(weights_not_finite(self.setup.model))
            if (name := next(filter(None, names), None)) is not None:
                raise FituneError(
                    f"{what}, since {name} is not finite itself: an earlier update was too large, lower optim.lr "
                    f"({self.setup.peak_lr:g}); {self.what_is_saved()}"
                )
            self.save_for_good()
            raise FituneError(
                f"{what}: lower optim.lr ({self.setup.peak_lr:g}) or look at the samples of these steps; the weights "
                f"before them are in {self.run.last}"
            )

    def what_is_saved(self) -> str:
        """Where weights are that are finite, as one clause."""
        self.tell_failed_save(wait=True)
        for directory in (self.run.last, self.run.best):
            if saved_not_finite(directory) is None:
                return f"the weights of an earlier step are in {directory}"
        return "no weights were saved before that"

    def evaluate(self) -> None:
        state = self.state
        if not len(self.data.eval) or state.evaluated_step == state.step:
            return
        reset_peak(self.device)
        start = time.perf_counter()
        own_rows = range(self.ranks.rank, len(self.data.eval), self.ranks.size)
        rows_at_once = self.config.batch.rows_per_step
        micro_batches = in_order(self.data.eval, own_rows, self.setup.eval_layout, rows_at_once=rows_at_once)
        with self.saved_before_it_ends():
            result = self.guard.evaluate(micro_batches)
        state = self.state
        peak = read_peak(self.device)
        metrics = EvalMetrics(
            step=state.step,
            total_tokens=state.tokens,
            eval_loss=result.loss,
            eval_perplexity=result.perplexity,
            eval_accuracy=result.accuracy,
            eval_tokens=result.num_supervised_tokens,
            seconds=time.perf_counter() - start,
            peak_allocated_bytes=peak.allocated_bytes,
        )
        self.write(self.run.metrics, metrics)
        if self.ranks.leads:
            append_eval_rows(self.run.eval_rows, _eval_rows(result, metrics), append=self.files.append)
        # the untrained model is measured but is no result of this run, nor is a loss that is not a number
        better = state.best_eval_loss is None or result.loss < state.best_eval_loss
        best = state.step > 0 and better and math.isfinite(result.loss)
        self.state = replace(
            state,
            eval_loss=result.loss,
            evaluated_step=state.step,
            best_eval_loss=result.loss if best else state.best_eval_loss,
            best_step=state.step if best else state.best_step,
            peak=larger_peak(state.peak, peak),
            eval_losses=(*state.eval_losses, result.loss)[-FLAT_EVALS:] if state.step else (),
        )
        if best:
            self.best_before = {"best_eval_loss": state.best_eval_loss, "best_step": state.best_step}
            self.save()
        self.watcher.evaluation(metrics, best=best)

    def save(self) -> None:
        """Begin to save the present commit as last/ (and best/), if that is not done already."""
        if self.saved == self.commit:
            return
        self.tell_failed_save(wait=True)
        if self.setup.settings.shards is None:  # else each holds a share of its own
            self.ranks.check_same(parameter for parameter in self.setup.model.parameters() if parameter.requires_grad)
        self.state = replace(self.state, seconds=self.seconds)
        self.writer.save(self.state, memory_model=self.guard.to_json())
        self.saved = self.commit
        self.write_summary("running")

    def tell_failed_save(self, *, wait: bool = False) -> None:
        """A save that fails does not end the run: the next one may succeed."""
        if wait:
            self.writer.wait()
        if (failure := self.writer.failure()) is not None:
            self.event("save_failed", f"warning: {failure}; the run goes on")
        for news in self.files.take_news():
            self.event("files_wait", news)

    def save_for_good(self) -> None:
        """Save and wait, again and again where a save fails. Raises RunDirectoryError where none goes well for
        LAST_SAVE_SECONDS."""
        self.tell_failed_save(wait=True)
        until = time.perf_counter() + LAST_SAVE_SECONDS
        if self.ranks.exchange(self.writer.failed_step)[0] == self.state.step:
            self.saved = None
        while True:
            self.save()
            self.writer.wait()
            failure, is_late = self.ranks.exchange((self.writer.failure(), time.perf_counter() >= until))[0]
            if failure is None:
                return
            if is_late:
                raise RunDirectoryError(f"{failure}; the checkpoint before it is whole")
            self.watcher.note(f"warning: {failure}; it is tried again for up to {LAST_SAVE_SECONDS:.0f} s: make room")
            self.saved = None
            time.sleep(SAVE_AGAIN_SECONDS)

    def write(self, path: Path, line: StepMetrics | EvalMetrics | RunEvent) -> None:
        if self.ranks.leads:
            self.files.append(path, line)

    def own_event(self, kind: str, message: str) -> None:
        """Of this process alone. The first one tells its own at once, and the others' after the step."""
        if self.ranks.leads:
            self.event(kind, message)
        elif kind in OWN_EVENTS:
            self.untold.append((kind, f"rank {self.ranks.rank}: {message}"))

    def event(self, kind: str, message: str) -> None:
        """Of all processes."""
        self.write(self.run.events, RunEvent(time=time.time(), step=self.state.step, kind=kind, message=message))
        if kind == "out_of_memory":
            self.state = replace(self.state, num_ooms=self.state.num_ooms + 1)
        self.watcher.note(message)

    @property
    def known_total_steps(self) -> int | None:
        """None where it is an estimate: tokens end the run, or steps may come to hold more of them."""
        is_known = self.length.tokens is None and self.config.train.batch_mode == "advise"
        return self.length.total_steps if is_known else None

    def write_summary(self, status: Status) -> Summary:
        state = self.state
        seconds = self.seconds
        predicted = None if self.self_check is None else self.self_check.predicted
        summary = Summary(
            status=status,
            steps=state.step,
            total_steps=self.known_total_steps,
            tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
            seconds=seconds,
            tokens_per_second=state.tokens / seconds if state.tokens else None,
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
            effective_batch=self.config.batch.rows_per_step,
            config_hash=config_hash(self.config),
            data_hash=self.data.train.data_hash,
        )
        if self.ranks.leads:
            self.files.replace(self.run.summary, summary_json(summary))
        return summary


def _eval_rows(result: EvalResult, metrics: EvalMetrics) -> EvalRows:
    pairs = zip(result.row_losses, result.row_weights, strict=True)
    losses = tuple(round(loss / weight, 6) if weight else 0.0 for loss, weight in pairs)
    return EvalRows(step=metrics.step, total_tokens=metrics.total_tokens, losses=losses, weights=result.row_weights)


def in_order(examples: Examples, numbers: Sequence[int], layout: Layout, *, rows_at_once: int) -> Iterator[MicroBatch]:
    """The rows of these numbers in micro-batches, read as they are needed."""
    for start in range(0, len(numbers), rows_at_once):
        rows = tuple(examples[number] for number in numbers[start : start + rows_at_once])
        yield from layout.split(Batch(rows))


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list that this yields; a second one acts as it usually does. Only the main
    thread may set handlers: elsewhere (a notebook's worker) signals stay as they are."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:
        previous.clear()
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
