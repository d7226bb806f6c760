"""The memory that a configured run will need on a device, before it runs: its own step recorded, the card's allocator
replayed, and what lies outside of PyTorch added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from fitune.config import RunConfig, read_config
from fitune.memory.c_allocator import allocator_habit
from fitune.memory.devices import Device, context_prior, cpu_device, find_device, this_machine
from fitune.memory.prediction import Interval, Prediction, PredictSettings, predict_steps
from fitune.memory.residuals import circumstances, measured_context, read_residuals, widen
from fitune.step.assemble import CPU_MICRO_TOKENS, CUDA_MICRO_TOKENS
from fitune.trace.cuda_behaviour import CudaTarget
from fitune.trace.recordings import Recordings
from fitune.trace.step import Pass, RecordedStep, longest_rows
from fitune.units import format_bytes

ConfigSource = RunConfig | Mapping[str, Any] | Path | str
OLDEST_FLASH = (8, 0)
"""Taken for a card that does not tell its compute capability."""


@dataclass(frozen=True, kw_only=True)
class RunPrediction:
    """largest: of the steady training step, or of the evaluation where that needs more. evaluation: None where the run
    has none. context_bytes: what the process holds outside PyTorch's allocator."""

    largest: Prediction
    training: Prediction
    evaluation: Prediction | None
    recorded: RecordedStep
    device: Device
    context_bytes: int

    @property
    def peak_phase(self) -> str:
        return self.largest.peak_phase if self.largest is self.training else "evaluation"


def predict(config: ConfigSource, *, gpu: str | None = None, overrides: Sequence[str] = ()) -> Prediction:
    """What the run of `config` needs at most, with rows as long as data.max_length allows.

    config: a RunConfig, a mapping, or the path of a YAML file. overrides: 'key.sub=value'. gpu: a card of the
    catalogue, or 'cpu'; else memory.gpu, else this machine's card, else its CPU. Needs no card, no weights and no data.
    Raises UsageError for an unknown card, and what the configuration's and the model's checks raise.
    """
    run = config if isinstance(config, RunConfig) else read_config(config, overrides).config
    return predict_run(run, choose_target(run, gpu=gpu)).largest


def choose_target(config: RunConfig, *, gpu: str | None = None) -> Device:
    named = gpu or config.memory.gpu
    if named is not None:
        return find_device(named)
    return next(iter(this_machine()), None) or cpu_device()


def predict_run(
    config: RunConfig,
    device: Device,
    *,
    passes: Sequence[Pass] | None = None,
    limit_bytes: int | None = None,
    recordings: Recordings | None = None,
    find_oom: bool = True,
) -> RunPrediction:
    """passes: what is recorded; the heaviest steps of the configuration where left out. limit_bytes: of the whole
    device, less than it has. On a CPU the program is counted as it is now, so ask before a model is loaded.

    recordings: shared by calls that predict many settings of one configuration (micro-batch, recompute, ...) for one
    device: what was recorded for one is then used for the others, with the same answers as without it.
    find_oom: as in `PredictSettings`.
    """
    program_bytes = psutil.Process().memory_info().rss if device.kind == "cpu" else None
    passes = passes or heaviest_passes(config, device)
    recorded = (recordings or Recordings()).step(config, passes, target=cuda_target(config, device))
    is_here = device.kind == "cpu" or device.uuid is not None
    here = circumstances(device, config.model.source) if is_here else None
    residuals = read_residuals(here) if here else ()
    device = replace(device, context=(measured_context(here) if here else None) or device.context)
    limited = device if limit_bytes is None else replace(device, total_bytes=min(limit_bytes, device.total_bytes))

    def complete(prediction: Prediction) -> Prediction:
        if program_bytes is not None:
            prediction = _in_process(prediction, config, limited, program_bytes=program_bytes)
        interval = prediction.device_interval
        if interval is not None and residuals:
            interval = widen(interval, residuals, reserved_bytes=prediction.peak_reserved_bytes)
        return replace(prediction, device_interval=interval)

    steps = [int(recorded.trace.columns().step.max())]
    if recorded.evaluation_step is not None:
        steps.append(recorded.evaluation_step)
    settings = PredictSettings(device=limited, allocator=config.memory.allocator, find_oom=find_oom)
    predicted = predict_steps(recorded.trace, settings, steps)
    training, *rest = map(complete, predicted)
    evaluation = rest[0] if rest else None
    largest = training
    if evaluation is not None and evaluation.peak_allocated_bytes > training.peak_allocated_bytes:
        largest = evaluation
    context = device.context or context_prior(device.compute_capability or OLDEST_FLASH)
    return RunPrediction(
        largest=largest,
        training=training,
        evaluation=evaluation,
        recorded=recorded,
        device=device,
        context_bytes=context.expected_bytes if program_bytes is None else program_bytes,
    )


def cuda_target(config: RunConfig, device: Device) -> CudaTarget | None:
    if device.kind == "cpu":
        return None
    return CudaTarget(device.compute_capability or OLDEST_FLASH, config.model.attention)


def rows_per_micro_batch(config: RunConfig, device: Device, row_tokens: int) -> int:
    """Of rows that are all as long as the longest."""
    batch = config.batch
    if batch.micro_rows is not None:
        return min(batch.micro_rows, batch.rows_per_step)
    auto = CPU_MICRO_TOKENS if device.kind == "cpu" else CUDA_MICRO_TOKENS
    budget_tokens = auto if batch.micro_tokens == "auto" else batch.micro_tokens
    return min(max(1, budget_tokens // row_tokens), batch.rows_per_step)


def heaviest_passes(config: RunConfig, device: Device, *, row_tokens: int | None = None) -> list[Pass]:
    """A first step, where the optimizer's state is born; an evaluation; the steady step with two micro-batches, the
    second of which finds the gradients of the first."""
    length = row_tokens or config.data.max_length
    num_rows = min(2 * rows_per_micro_batch(config, device, length), config.batch.rows_per_step)
    rows = longest_rows(config, num_rows=num_rows, row_tokens=length)
    first, steady = Pass("train", rows, most_micro_batches=1), Pass("train", rows)
    evaluated = config.data.eval is not None or config.data.eval_fraction > 0
    return [first, *([Pass("eval", rows, most_micro_batches=1)] if evaluated else []), steady]


def _in_process(prediction: Prediction, config: RunConfig, device: Device, *, program_bytes: int) -> Prediction:
    """On a CPU the process is the device: live bytes as the C library holds them, and the program itself."""
    method: Literal["full", "lora"] = "full" if config.model.method == "full" else "lora"
    habit = allocator_habit(method, recomputes=config.model.recompute not in ("auto", "off"))
    live = prediction.peak_allocated_bytes
    low, expected, high = habit.resident_bytes(live)
    device_bytes = expected + program_bytes
    reason = (
        f"{habit.name} was measured to keep {format_bytes(low - live)} to {format_bytes(high - live)} beside tensors"
    )
    return replace(
        prediction,
        peak_reserved_bytes=expected,
        device_bytes=device_bytes,
        device_interval=Interval(low + program_bytes, high + program_bytes, (reason,)),
        fits=device_bytes <= device.total_bytes,
    )
