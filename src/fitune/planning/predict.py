"""The memory that a configured run will need on a device, before it runs: its own step recorded, the card's allocator
replayed, and what lies outside of PyTorch added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from fitune.allocator.prediction import Interval, Prediction, PredictSettings, either_routing, predict_steps
from fitune.boundary import bounded
from fitune.config import ModelConfig, RunConfig, read_config
from fitune.distributed.sharding import dealt_layers
from fitune.errors import ConfigError
from fitune.machine.cards import Device, context_prior
from fitune.machine.devices import cpu_device, find_device, this_machine
from fitune.machine.libc import allocator_habit
from fitune.model.load import check_length, load_model
from fitune.model.precision import Precision
from fitune.planning.choices import with_routing
from fitune.planning.past_errors import circumstances, measured_context, read_residuals, widen
from fitune.planning.stated import stated
from fitune.step.assemble import CPU_MICRO_TOKENS, CUDA_MICRO_TOKENS
from fitune.trace.cuda_target import CudaTarget
from fitune.trace.library import Recordings
from fitune.trace.own_step import Pass, RecordedStep, longest_rows, steady_passes
from fitune.trace.sharded import sharded
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


@bounded("fitune.predict")
def predict(config: ConfigSource, *, gpu: str | None = None, overrides: Sequence[str] = ()) -> Prediction:
    """What the run of `config` needs at most, with rows as long as data.max_length allows.

    config: a RunConfig, a mapping, or the path of a YAML file. overrides: 'key.sub=value'. gpu: a card of the
    catalogue, or 'cpu'; else memory.gpu, else this machine's card, else its CPU. Needs no card, no weights and no data.
    Where it matters which experts get the tokens, `device_interval` spans both of memory.routing.
    Raises UsageError for an unknown card, and what the configuration's and the model's checks raise.
    """
    run = config if isinstance(config, RunConfig) else read_config(config, overrides).config
    device = choose_target(run, gpu=gpu)
    check_length(run)
    recordings = Recordings()
    return either_routing(
        lambda routing: predict_run(with_routing(run, routing), device, recordings=recordings).largest,
        routing=run.memory.routing,
    )


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
    num_shards: int = 1,
) -> RunPrediction:
    """passes: what is recorded; the heaviest steps of the configuration where left out. limit_bytes: of the whole
    device, less than it has. On a CPU the program is counted as it is now, so ask before a model is loaded.

    recordings: shared by calls that predict many settings of one configuration (micro-batch, recompute, ...) for one
    device: what was recorded for one is then used for the others, with the same answers as without it.
    find_oom: as in `PredictSettings`. num_shards: the processes that model.shard=full deals the weights over; raises
    ConfigError where it is set and there is one.
    """
    if config.model.shard != "none" and num_shards == 1:
        raise ConfigError(["model.shard=full shards the weights over cards: say over how many with --gpus, or drop it"])
    program_bytes = psutil.Process().memory_info().rss if device.kind == "cpu" else None
    passes = passes or heaviest_passes(config, device)
    recorded = (recordings or Recordings()).step(config, passes, target=cuda_target(config, device))
    trace = replace(recorded.trace, source=(*recorded.trace.source, *stated(config)))
    if config.model.shard != "none":
        held_bytes = gathered_bytes(config.model, recorded.precision, num_shards=num_shards)
        trace = sharded(trace, num_shards=num_shards, gathered_bytes=held_bytes)
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

    steps = [int(trace.columns().step.max())]
    if recorded.evaluation_step is not None:
        steps.append(recorded.evaluation_step)
    settings = PredictSettings(device=limited, allocator=config.memory.allocator, find_oom=find_oom)
    predicted = predict_steps(trace, settings, steps)
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


def gathered_bytes(model: ModelConfig, precision: Precision, *, num_shards: int) -> int:
    """What a process holds at most, beside its own shards, of a model that `shard_model` deals.

    What belongs to no layer (embedding, last norm, head) is gathered from the first forward to the end of the backward,
    and its gradient is there as long. Beside it there is the layer that computes: forward its weights, the flat buffer
    that they arrived in and that of the next one; backward its weights, the next one's buffer, its gradient and the
    float32 buffers that the gradient is summed through. At the end the sum of what belongs to no layer.
    """
    built = load_model(model, torch.device("meta"), precision=precision)
    layers = dealt_layers(built)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = _GroupBytes.of([p for p in built.parameters() if id(p) not in inside], num_shards)
    every = (_GroupBytes.of(list(layer.parameters()), num_shards) for layer in layers)
    most = max(every, key=lambda each: each.weights)
    backward = 2 * most.weights + most.gradients + most.sums
    return rest.weights + rest.gradients + max(3 * most.weights, backward, rest.sums, rest.weights)


@dataclass(frozen=True)
class _GroupBytes:
    """Of what is gathered together: its weights, its gradients, and what they are summed through."""

    weights: int
    gradients: int
    sums: int

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], num_shards: int) -> "_GroupBytes":
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return cls(
            weights=sum(parameter.nbytes for parameter in parameters),
            gradients=sum(parameter.nbytes for parameter in trained),
            sums=sum(-(-4 * parameter.numel() * (num_shards + 1) // num_shards) for parameter in trained),
        )


def cuda_target(config: RunConfig, device: Device) -> CudaTarget | None:
    if device.kind == "cpu":
        return None
    return CudaTarget(
        device.compute_capability or OLDEST_FLASH, config.model.attention, multiprocessors=device.multiprocessors
    )


def rows_per_micro_batch(config: RunConfig, device: Device, row_tokens: int) -> int:
    """Of rows that are all as long as the longest."""
    batch = config.batch
    if batch.micro_rows is not None:
        return min(batch.micro_rows, batch.rows_per_step)
    auto = CPU_MICRO_TOKENS if device.kind == "cpu" else CUDA_MICRO_TOKENS
    budget_tokens = auto if batch.micro_tokens == "auto" else batch.micro_tokens
    return min(max(1, budget_tokens // row_tokens), batch.rows_per_step)


def heaviest_passes(config: RunConfig, device: Device, *, row_tokens: int | None = None) -> list[Pass]:
    """As `steady_passes`, of rows as long as the longest."""
    length = row_tokens or config.data.max_length
    num_rows = min(2 * rows_per_micro_batch(config, device, length), config.batch.rows_per_step)
    rows = longest_rows(config, num_rows=num_rows, row_tokens=length)
    evaluated = config.data.eval is not None or config.data.eval_fraction > 0
    return steady_passes(
        config.optim,
        Pass("train", rows),
        evaluation=Pass("eval", rows, most_micro_batches=1) if evaluated else None,
    )


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
        fits=True if device_bytes <= device.total_bytes else None if config.model.compile else False,
    )
