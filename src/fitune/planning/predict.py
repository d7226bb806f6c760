"""Predicts the memory that a configured run will need on a device, before it runs.

It records the run's own step, replays the allocations in a model of the card's allocator, and adds
the memory that the process holds outside of PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from fitune.allocator.prediction import (
    Interval,
    Prediction,
    PredictSettings,
    either_routing,
    predict_steps,
)
from fitune.boundary import bounded
from fitune.config import BatchConfig, ModelConfig, RunConfig, read_config
from fitune.distributed.sharding import gathered_layers
from fitune.errors import ConfigError, UsageError
from fitune.machine.cards import Device, context_prior
from fitune.machine.devices import cpu_device, find_device, this_machine
from fitune.machine.libc import allocator_habit
from fitune.machine.process_memory import unknown_accelerator
from fitune.model.load import check_length, load_model
from fitune.model.precision import Precision
from fitune.planning.choices import with_routing
from fitune.planning.past_errors import circumstances, measured_context, read_residuals, widen
from fitune.planning.stated import stated
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryTrace
from fitune.step.assemble import CPU_MICRO_TOKENS, CUDA_MICRO_TOKENS
from fitune.trace.library import Recordings
from fitune.trace.own_step import Pass, RecordedStep, longest_rows, steady_passes
from fitune.trace.sharded import sharded
from fitune.units import format_bytes

ConfigSource = RunConfig | Mapping[str, object] | Path | str
#: of a recorded step; samples are laid out one by one, which takes minutes from here on
MOST_TOKENS = 2**25
#: assumed for a card whose compute capability is unknown
OLDEST_FLASH = (8, 0)


@dataclass(frozen=True, kw_only=True)
class RunPrediction:
    """The predictions of one run's training step and evaluation."""

    #: the training step's, or the evaluation's if that needs more
    largest: Prediction
    #: of a step after the first ones, when the optimizer's state exists
    training: Prediction
    #: None where the run has no evaluation
    evaluation: Prediction | None
    #: of the pass before the first step that computes a reference which is kept
    reference: Prediction | None
    recorded: RecordedStep
    device: Device
    #: what the process holds outside PyTorch's allocator
    context_bytes: int

    @property
    def peak_phase(self) -> str:
        if self.largest is self.training:
            return self.largest.peak_phase
        return "evaluation" if self.largest is self.evaluation else "reference"


@bounded("fitune.predict")
def predict(
    config: ConfigSource, *, gpu: str | None = None, overrides: Sequence[str] = ()
) -> Prediction:
    """Predict the most memory that the run of `config` needs.

    All samples are as long as data.max_length allows. The prediction needs no card, no weights and
    no data. If the memory depends on which experts get the tokens, `device_interval` spans both
    values of memory.routing.

    config: a RunConfig, a mapping, or the path of a YAML file.
    gpu: a card of the catalogue, or 'cpu'. None for memory.gpu, else this machine's card, else its
        CPU.
    overrides: changes of the configuration, each written 'key.sub=value'.

    Raises UsageError for an unknown card, and what the checks of the configuration and of the model
    raise.
    """
    run = config if isinstance(config, RunConfig) else read_config(config, overrides).config
    device = choose_target(gpu or run.memory.gpu)
    check_length(run.model, run.data.max_length)
    recordings = Recordings()
    return either_routing(
        lambda routing: (
            predict_run(with_routing(run, routing), device, recordings=recordings).largest
        ),
        routing=run.memory.routing,
    )


def choose_target(gpu: str | None) -> Device:
    """Return the card of that name, else this machine's card, else its CPU."""
    if gpu is not None:
        return find_device(gpu)
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
    """Predict the memory of a run's training step and evaluation.

    On a CPU, call it before a model is loaded: the memory that the process holds now is counted as
    the program's.

    passes: the steps to record; None for the heaviest ones of the configuration.
    limit_bytes: a limit on the memory of the whole device, where it is less than the device has.
    recordings: give the same object to calls that predict many settings (micro-batch, gradient
        checkpointing, ...) of one configuration on one device. Recordings of one setting are then
        used for others. The results are the same as without it.
    find_oom: as in `PredictSettings`.
    num_shards: the number of processes that model.shard=full shards the weights over.

    Raises ConfigError if model.shard=full is set and num_shards is 1.
    """
    if config.model.shard != "none" and num_shards == 1:
        raise ConfigError(
            [
                "model.shard=full shards the weights over cards: say over how many with --gpus, or drop it"
            ]
        )
    program_bytes = psutil.Process().memory_info().rss if device.kind == "cpu" else None
    passes = passes or heaviest_passes(config, device)
    _check_tokens(passes)
    recordings = recordings or Recordings()
    target = cuda_target(config.model, device)
    recorded = recordings.step(config, passes, target=target)
    trace = _complete_trace(config.model, recorded, num_shards=num_shards)
    if device.kind == "cpu" and (note := unknown_accelerator()) is not None:
        trace = replace(trace, source=(*trace.source, note))
    is_here = device.kind == "cpu" or device.uuid is not None
    here = circumstances(device, config.model.source) if is_here else None
    residuals = read_residuals(here) if here else ()
    device = replace(device, context=(measured_context(here) if here else None) or device.context)
    limited = device
    if limit_bytes is not None:
        limited = replace(device, total_bytes=min(limit_bytes, device.total_bytes))

    def complete(prediction: Prediction) -> Prediction:
        if program_bytes is not None:
            prediction = _in_process(prediction, config.model, limited, program_bytes=program_bytes)
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
    reference = None
    if config.reference == "kept" and passes[-1].kind == "train":
        once = recordings.step(config, [reference_pass(passes[-1])], target=target)
        of_once = _complete_trace(config.model, once, num_shards=num_shards)
        reference = complete(*predict_steps(of_once, settings, [1]))
    every = (training, evaluation, reference)
    largest = max((each for each in every if each), key=lambda each: each.peak_allocated_bytes)
    context = device.context or context_prior(device.compute_capability or OLDEST_FLASH)
    return RunPrediction(
        largest=largest,
        training=training,
        evaluation=evaluation,
        reference=reference,
        recorded=recorded,
        device=device,
        context_bytes=context.expected_bytes if program_bytes is None else program_bytes,
    )


def _complete_trace(model: ModelConfig, recorded: RecordedStep, *, num_shards: int) -> MemoryTrace:
    """Return the recorded trace with the notes on the run, and with its weights sharded."""
    trace = replace(recorded.trace, source=(*recorded.trace.source, *stated(model)))
    if model.shard == "none":
        return trace
    held_bytes = gathered_bytes(model, recorded.precision, num_shards=num_shards)
    return sharded(trace, num_shards=num_shards, gathered_bytes=held_bytes)


def gathered_bytes(model: ModelConfig, precision: Precision, *, num_shards: int) -> int:
    """Return the most bytes that a process holds in addition to its own shards of the model.

    The parameters outside of the layers (embedding, last norm, head) are gathered from the first
    forward to the end of the backward, and so long their gradients exist too. In addition there is
    the layer that is being computed:

    - forward: its weights, the flat buffer that they were gathered into, and the next layer's;
    - backward: its weights, the next layer's buffer, its gradients, and the float32 buffers in
      which the gradients are summed.

    At the end, the gradients of the parameters outside of the layers are summed.
    """
    built = load_model(model, torch.device("meta"), precision=precision)
    layers = gathered_layers(built)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = _GroupBytes.of([p for p in built.parameters() if id(p) not in inside], num_shards)
    every = (_GroupBytes.of(list(layer.parameters()), num_shards) for layer in layers)
    most = max(every, key=lambda each: each.weights)
    backward = 2 * most.weights + most.gradients + most.sums
    return rest.weights + rest.gradients + max(3 * most.weights, backward, rest.sums, rest.weights)


@dataclass(frozen=True)
class _GroupBytes:
    """The bytes of parameters that are gathered together."""

    weights: int
    gradients: int
    #: the float32 buffers in which the gradients are summed
    sums: int

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], num_shards: int) -> "_GroupBytes":
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return cls(
            weights=sum(parameter.nbytes for parameter in parameters),
            gradients=sum(parameter.nbytes for parameter in trained),
            sums=sum(
                -(-4 * parameter.numel() * (num_shards + 1) // num_shards) for parameter in trained
            ),
        )


def cuda_target(model: ModelConfig, device: Device) -> CudaTarget | None:
    if device.kind == "cpu":
        return None
    return CudaTarget(
        device.compute_capability or OLDEST_FLASH,
        model.attention,
        multiprocessors=device.multiprocessors,
    )


def rows_per_micro_batch(batch: BatchConfig, device: Device, row_tokens: int) -> int:
    """Return how many samples a micro-batch has if all are as long as the longest."""
    if batch.micro_rows is not None:
        return min(batch.micro_rows, batch.rows_per_step)
    auto = CPU_MICRO_TOKENS if device.kind == "cpu" else CUDA_MICRO_TOKENS
    budget_tokens = auto if batch.micro_tokens == "auto" else batch.micro_tokens
    return min(max(1, budget_tokens // row_tokens), batch.rows_per_step)


def heaviest_passes(
    config: RunConfig, device: Device, *, row_tokens: int | None = None
) -> list[Pass]:
    """Return what `steady_passes` returns for samples that are all as long as the longest."""
    length = row_tokens or config.sample_tokens
    num_rows = min(
        2 * rows_per_micro_batch(config.batch, device, length), config.batch.rows_per_step
    )
    rows = longest_rows(length, num_rows=num_rows)
    return steady_passes(
        config.optim,
        Pass("train", rows),
        evaluation=Pass("eval", rows, most_micro_batches=1) if config.data.is_evaluated else None,
    )


def reference_pass(step: Pass) -> Pass:
    """Return the two largest micro-batches of the pass that computes the reference of samples."""
    return Pass("reference", step.rows)


def _check_tokens(passes: Sequence[Pass]) -> None:
    """Raise UsageError for micro-batches so large that laying them out would fill the memory."""
    tokens = max(sum(length for length, _ in each.rows) for each in passes)
    if tokens > MOST_TOKENS:
        raise UsageError(
            f"{tokens:,} tokens in one or two micro-batches are more than is predicted "
            f"({MOST_TOKENS:,}): lower batch.micro, batch.micro_tokens or data.max_length"
        )


def _in_process(
    prediction: Prediction, model: ModelConfig, device: Device, *, program_bytes: int
) -> Prediction:
    """Add to a prediction for the CPU the memory of the process itself.

    The process occupies what the C library holds for the tensors, and the memory of the program.
    """
    method: Literal["full", "lora"] = "full" if model.method == "full" else "lora"
    habit = allocator_habit(method, recomputes=model.recompute not in ("auto", "off"))
    live = prediction.peak_allocated_bytes
    low, expected, high = habit.resident_bytes(live)
    device_bytes = expected + program_bytes
    least, most = format_bytes(low - live), format_bytes(high - live)
    reason = f"{habit.name} was measured to keep {least} to {most} beside tensors"
    does_not_fit = None if model.compile else False
    return replace(
        prediction,
        peak_reserved_bytes=expected,
        device_bytes=device_bytes,
        device_interval=Interval(low + program_bytes, high + program_bytes, (reason,)),
        fits=True if device_bytes <= device.total_bytes else does_not_fit,
    )
