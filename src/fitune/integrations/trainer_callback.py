"""A callback that keeps a run directory of a Trainer's run, which `fitune watch`, `compare` and `report` read.

    metrics.jsonl            a line each time that the Trainer logs
    memory.jsonl             memory, when a step ends and half a second has passed
    peak.json, summary.json  the prediction, where one was given, beside what was measured

It reads and never writes what the Trainer computes with: the run is the same, bit for bit, as without it.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fitune.memory.prediction import Prediction, peak_json
from fitune.run.directory import RunDirectory, create_run, working_on, write_json
from fitune.run.memory import MemorySample
from fitune.run.metrics import StepMetrics, Summary, append_line, summary_json

SAMPLE_SECONDS = 0.5


class FituneCallback(TrainerCallback):  # type: ignore[misc]
    """`trainer.add_callback(FituneCallback("runs", "first"))`, or among the Trainer's `callbacks`.

    output, name: where the run is kept; a name that ends in '-' is numbered. overwrite: an earlier run of that name.
    prediction: of `predict_trainer`, to stand beside what is measured. Raises RunDirectoryError when training begins,
    where the directory exists or cannot be written.
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
        self._open = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.run = create_run(self._output, self._name, overwrite=self._overwrite)
        self._open.enter_context(working_on(self.run))
        if self._prediction is not None:
            write_json(self.run.peak, peak_json(self._prediction))
        self._counts = _Counts()
        handle = objects["model"].register_forward_pre_hook(self._counts.see, with_kwargs=True)
        self._open.callback(handle.remove)
        self._device = args.device
        self._began = self._logged = time.perf_counter()
        self._sampled, self._logged_step, self._tokens = 0.0, state.global_step, 0
        predicted = self._prediction
        self._summary = Summary(
            effective_batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            predicted_allocated_bytes=None if predicted is None else predicted.peak_allocated_bytes,
            predicted_reserved_bytes=None if predicted is None else predicted.peak_reserved_bytes,
        )
        self._write_summary()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        now = time.perf_counter()
        if self.run is None or now - self._sampled < SAMPLE_SECONDS:
            return
        self._sampled = now
        cuda = self._device.type == "cuda"
        host = psutil.virtual_memory()
        free, total = torch.cuda.mem_get_info(self._device) if cuda else (host.available, host.total)
        sample = MemorySample(
            time=time.time(),
            step=state.global_step,
            progress_fraction=state.global_step / max(state.max_steps, 1),
            allocated_bytes=torch.cuda.memory_allocated(self._device) if cuda else None,
            reserved_bytes=torch.cuda.memory_reserved(self._device) if cuda else None,
            process_bytes=psutil.Process().memory_info().rss,
            device_used_bytes=total - free,
            device_total_bytes=total,
        )
        append_line(self.run.memory, sample, leave_out_unknown=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **objects: Any) -> None:
        if self.run is None or logs is None or "loss" not in logs or state.global_step == self._logged_step:
            return
        now, (rows, tokens, supervised, calls) = time.perf_counter(), self._counts.take()
        num_steps = state.global_step - self._logged_step
        self._tokens += tokens
        cuda = self._device.type == "cuda"
        metrics = StepMetrics(
            step=state.global_step,
            tokens=tokens // num_steps,
            supervised_tokens=supervised // num_steps,
            total_tokens=self._tokens,
            loss=float(logs["loss"]),
            lr=float(logs.get("learning_rate", 0.0)),
            grad_norm=float(logs.get("grad_norm", float("nan"))),
            seconds=(now - self._logged) / num_steps,
            tokens_per_second=tokens / (now - self._logged),
            num_micro_batches=calls // num_steps,
            micro_batch=rows,
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._device) if cuda else None,
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device) if cuda else None,
            device_used_bytes=None if cuda else psutil.Process().memory_info().rss,
        )
        append_line(self.run.metrics, metrics)
        self._logged, self._logged_step = now, state.global_step
        self._summary = replace(
            self._summary,
            steps=metrics.step,
            tokens=self._tokens,
            supervised_tokens=self._summary.supervised_tokens + supervised,
            seconds=now - self._began,
            tokens_per_second=self._tokens / (now - self._began),
            train_loss=metrics.loss,
            peak_allocated_bytes=metrics.peak_allocated_bytes,
            peak_reserved_bytes=metrics.peak_reserved_bytes,
        )
        self._write_summary()

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._summary = replace(self._summary, status="finished")
        self._write_summary()
        self._open.close()

    def _write_summary(self) -> None:
        assert self.run is not None
        write_json(self.run.summary, summary_json(self._summary))


class _Counts:
    """Of the forwards in training since the last log. Targets are added up on the device, without waiting for it."""

    def __init__(self) -> None:
        self._rows = self._tokens = self._calls = 0
        self._supervised: Tensor | int = 0

    def see(self, model: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if not model.training or not isinstance(ids, Tensor):
            return
        self._calls += 1
        self._rows = max(self._rows, ids.shape[0])
        self._tokens += ids.numel()
        if isinstance(labels, Tensor):
            self._supervised = self._supervised + (labels[..., 1:] != -100).sum()

    def take(self) -> tuple[int, int, int, int]:
        """(rows of the largest forward, tokens with padding, targets, forwards); counted anew from here."""
        taken = self._rows, self._tokens, int(self._supervised), self._calls
        self.__init__()  # type: ignore[misc]
        return taken
