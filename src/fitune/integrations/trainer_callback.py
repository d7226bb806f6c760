"""Writes a run directory for a Trainer's run, which `fitune watch`, `compare` and `report` read.

    metrics.jsonl   a line at each log of the Trainer (with the gradient noise) and each evaluation
    memory.jsonl    memory, card and machine twice a second, written by a thread of its own
    events.jsonl    alarms: little memory left, other processes, a leak, a loss that jumps
    peak.json       the prediction, if one was given
    summary.json    what was measured, and the predicted peaks

The callback reads what the Trainer computes with and never changes it: the run's results are the
same, bit for bit, as without the callback.
"""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fitune.allocator.prediction import Prediction, peak_json
from fitune.batch_size.noise import (
    FEWEST_HALF_LIFE_STEPS,
    HALF_LIFE_FRACTION,
    NoiseAverages,
    noise_fields,
    observe,
    observe_preconditioned,
)
from fitune.integrations.trainer_steps import SeenStep, StepReader
from fitune.machine.process_memory import MemoryPeak, program_bytes, read_peak, reset_peak
from fitune.run.directory import RunDirectory, create_run, working_on
from fitune.run.files import write_json
from fitune.run.metrics import EvalMetrics, StepMetrics, Summary, summary_json
from fitune.run.patient_files import PatientFiles
from fitune.training.state import larger_peak
from fitune.watch.alarms import AlarmSettings
from fitune.watch.monitor import Monitor, MonitorSettings

log = logging.getLogger(__name__)

#: how long the end of training waits for a file system that refuses writes
LAST_WRITE_SECONDS = 20.0
#: the Trainer's name of each setting that an alarm names as fitune's configuration does
TRAINERS_NAMES = {
    "batch.micro_tokens or batch.micro": "per_device_train_batch_size",
    "batch.micro_tokens": "per_device_train_batch_size",
    "memory.allocator=": "PYTORCH_ALLOC_CONF=",
    "optim.clip": "max_grad_norm",
    "optim.lr": "learning_rate",
}


class FituneCallback(TrainerCallback):  # type: ignore[misc]
    """A Trainer callback that writes a run directory.

        trainer.add_callback(FituneCallback("runs", "first"))

    output, name: the run directory is `output`/`name`; a name that ends in '-' gets a number.
    overwrite: whether an earlier run of that name is replaced.
    prediction: the result of `predict_trainer`, stored for comparison with the measured memory.

    When training begins, RunDirectoryError is raised if the directory exists or cannot be
    written. The gradient noise is measured only if training uses one device. With several
    processes, only the first writes the run. After training that ended in an error, call
    `close()` to end the thread that watches memory.
    """

    def __init__(
        self,
        output: Path | str = "runs",
        name: str = "trainer-",
        *,
        overwrite: bool = False,
        prediction: Prediction | None = None,
    ) -> None:
        self._output, self._name, self._overwrite = Path(output), name, overwrite
        self._prediction = prediction
        self.run: RunDirectory | None = None
        self._open, self._is_open, self._files = ExitStack(), False, PatientFiles()

    def close(self) -> None:
        self._is_open = False
        self._open.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self.close()
        if not state.is_world_process_zero:
            return
        model, optimizer = objects["model"], objects["optimizer"]
        self.run = create_run(self._output, self._name, overwrite=self._overwrite)
        self._open.enter_context(working_on(self.run))
        if self._prediction is not None:
            write_json(self.run.peak, peak_json(self._prediction))
        is_alone = args.world_size == 1 and args.n_gpu <= 1
        self._reader = StepReader(model, optimizer, clip=args.max_grad_norm or 0.0, noise=is_alone)
        self._open.callback(self._reader.close)
        self._device = args.device
        parameters = list(model.parameters())
        held = program_bytes(self._device)
        self._program_bytes = (
            None if held is None else max(held - sum(each.nbytes for each in parameters), 0)
        )
        settings = self._monitor_settings(
            args, sum(each.nbytes for each in parameters if each.requires_grad)
        )
        self._monitor = self._open.enter_context(
            Monitor(self.run, model, optimizer, settings=settings, notify=log.warning)
        )
        reset_peak(self._device)
        self._began = self._logged = time.perf_counter()
        self._logged_step, self._seen = state.global_step, SeenStep()
        self._noise, self._preconditioned = NoiseAverages(), NoiseAverages()
        self._num_steps, self._total = 0, SeenStep()
        self._peak = self._run_peak = MemoryPeak()
        predicted = self._prediction
        self._summary = Summary(
            total_steps=state.max_steps if state.max_steps > 0 else None,
            effective_batch=args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            predicted_allocated_bytes=None if predicted is None else predicted.peak_allocated_bytes,
            predicted_reserved_bytes=None if predicted is None else predicted.peak_reserved_bytes,
        )
        self._write_summary()
        self._is_open = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        if not self._is_open:
            return
        seen = self._reader.take()
        self._seen, self._total = self._seen.with_step(seen), self._total.with_step(seen)
        self._num_steps += 1
        if seen.norms is None or not self._total.supervised_tokens:
            return
        step_tokens = self._total.supervised_tokens / self._num_steps
        half_life = step_tokens * max(HALF_LIFE_FRACTION * state.max_steps, FEWEST_HALF_LIFE_STEPS)
        beta1 = objects["optimizer"].param_groups[0].get("betas", (0.0,))[0]
        clip = args.max_grad_norm or 0.0
        self._noise = observe(
            self._noise, seen.norms, half_life_tokens=half_life, beta1=beta1, clip=clip
        )
        self._preconditioned = observe_preconditioned(
            self._preconditioned, seen.norms, half_life_tokens=half_life
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: object,
    ) -> None:
        if not self._is_open:
            return
        self._peak = larger_peak(
            self._peak, read_peak(self._device).without_program(self._program_bytes)
        )
        self._monitor.reached(state.global_step, progress=_progress(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, object] | None = None,
        **objects: object,
    ) -> None:
        if not self._is_open or logs is None:
            return
        if "eval_loss" in logs:
            self._log_evaluation(state.global_step, logs)
        if "loss" in logs and state.global_step > self._logged_step:
            self._log_step(state, logs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: object,
    ) -> None:
        if not self._is_open:
            return
        self._summary = replace(self._summary, status="finished")
        self._write_summary()
        if (lost := self._files.close(patience=LAST_WRITE_SECONDS)) is not None:
            log.warning(lost)
        self.close()

    def _log_step(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Write a line of metrics.

        Loss, tokens and seconds are means over the steps since the Trainer's last log.
        """
        assert self.run is not None
        now, seen, peak = time.perf_counter(), self._seen, self._peak
        num_steps = state.global_step - self._logged_step
        step_tokens = self._total.supervised_tokens / max(self._num_steps, 1)
        metrics = StepMetrics(
            step=state.global_step,
            tokens=seen.tokens // num_steps,
            supervised_tokens=seen.supervised_tokens // num_steps,
            total_tokens=self._total.tokens,
            loss=float(logs["loss"]),
            lr=float(logs.get("learning_rate", 0.0)),
            grad_norm=float(logs.get("grad_norm", float("nan"))),
            seconds=(now - self._logged) / num_steps,
            tokens_per_second=seen.tokens / (now - self._logged),
            num_micro_batches=seen.num_forwards // num_steps,
            micro_batch=seen.rows,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            device_used_bytes=peak.device_bytes,
            **noise_fields(self._noise, self._preconditioned, step_tokens=step_tokens),
        )
        self._files.append(self.run.metrics, metrics)
        self._monitor.step(metrics, progress=_progress(state))
        self._logged, self._logged_step, self._seen = now, state.global_step, SeenStep()
        self._run_peak, self._peak = larger_peak(self._run_peak, peak), MemoryPeak()
        reset_peak(self._device)
        self._summary = replace(
            self._summary,
            steps=metrics.step,
            tokens=self._total.tokens,
            supervised_tokens=self._total.supervised_tokens,
            seconds=now - self._began,
            tokens_per_second=self._total.tokens / (now - self._began),
            train_loss=metrics.loss,
            peak_allocated_bytes=self._run_peak.allocated_bytes,
            peak_reserved_bytes=self._run_peak.reserved_bytes,
            peak_device_bytes=self._run_peak.device_bytes,
        )
        self._write_summary()

    def _log_evaluation(self, step: int, logs: dict[str, Any]) -> None:
        """Write a line of evaluation metrics.

        The loss is the Trainer's: the mean over the batches of each batch's mean. Only TRL reports
        an accuracy; for other Trainers it is NaN.
        """
        assert self.run is not None
        loss = float(logs["eval_loss"])
        metrics = EvalMetrics(
            step=step,
            total_tokens=self._total.tokens,
            eval_loss=loss,
            eval_perplexity=math.exp(min(loss, 700.0)),
            eval_accuracy=float(logs.get("eval_mean_token_accuracy", float("nan"))),
            eval_tokens=self._reader.take_evaluation(),
            seconds=float(logs.get("eval_runtime", float("nan"))),
        )
        self._files.append(self.run.metrics, metrics)
        best = self._summary.best_eval_loss
        self._summary = replace(
            self._summary, eval_loss=loss, best_eval_loss=loss if best is None else min(best, loss)
        )
        self._write_summary()

    def _monitor_settings(self, args: TrainingArguments, trainable_bytes: int) -> MonitorSettings:
        predicted = self._prediction
        alarms = AlarmSettings(
            clip=args.max_grad_norm or 0.0,
            on_cpu=self._device.type == "cpu",
            save_bytes=trainable_bytes,
            predicted_bytes=None if predicted is None else predicted.peak_reserved_bytes,
        )
        return MonitorSettings(alarms, names=TRAINERS_NAMES)

    def _write_summary(self) -> None:
        assert self.run is not None
        self._files.replace(self.run.summary, summary_json(self._summary))
        for news in self._files.take_news():
            log.warning(news)


def _progress(state: TrainerState) -> float:
    return min(float(state.global_step / max(state.max_steps, 1)), 1.0)
