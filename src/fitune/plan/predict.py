"""The memory that a configured run will need on a device, before it runs: record the step, replay the allocator, add
what lies outside of PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fitune.config import RunConfig, read_config
from fitune.memory.allocator_config import parse_allocator_config
from fitune.memory.c_allocator import allocator_factor
from fitune.memory.devices import Device, context_prior, cpu_device, find_device, this_machine
from fitune.memory.peak import Alive, Peak, find_peak
from fitune.memory.replay import ReplayResult, ReplaySettings, replay
from fitune.step.assemble import CPU_MICRO_TOKENS, CUDA_MICRO_TOKENS
from fitune.trace.cuda_behaviour import CudaTarget
from fitune.trace.events import Category
from fitune.trace.step import Pass, RecordedStep, longest_rows, record_step
from fitune.units import format_bytes

ConfigSource = RunConfig | Mapping[str, Any] | Path | str
UNKNOWN_CAPABILITY = (8, 0)
SHOWN_ALIVE = 12


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The peak of a run's steady step, or of its evaluation where that is higher.

    peak_allocated_bytes, peak_reserved_bytes: as torch.cuda.max_memory_allocated and max_memory_reserved; on a CPU the
    live bytes, and those with what the C library keeps. device_bytes: reserved and context_bytes, what nvidia-smi (on a
    CPU: the resident set) will show; low_bytes and high_bytes are its interval, with reasons. categories: sum to
    peak_allocated_bytes. alive: what is alive at the peak, the largest kinds first. evaluation_allocated_bytes: the peak
    of an evaluation alone, None where the run has none. first_oom_bytes: what the allocation asked for that a limit
    refused, None where all fits.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    context_bytes: int
    low_bytes: int
    high_bytes: int
    reasons: tuple[str, ...]
    categories: Mapping[Category, int]
    peak_phase: str
    peak_module: str
    alive: tuple[Alive, ...]
    evaluation_allocated_bytes: int | None
    num_alloc_retries: int
    fits: bool
    recorded: RecordedStep
    device: Device


def predict(config: ConfigSource, *, gpu: str | None = None, overrides: Sequence[str] = ()) -> Prediction:
    """What the run of `config` needs at most, its rows as long as data.max_length allows.

    config: a RunConfig, a mapping, or the path of a YAML file; overrides: 'key.sub=value'. gpu: a card of the catalogue,
    or 'cpu'; else memory.gpu, else this machine's card, else its CPU. Raises UsageError for an unknown card, and what
    the model's and the configuration's checks raise.
    """
    resolved = read_run_config(config, overrides)
    return predict_run(resolved, choose_target(resolved, gpu=gpu))


def read_run_config(config: ConfigSource, overrides: Sequence[str] = ()) -> RunConfig:
    if isinstance(config, RunConfig):
        return config if not overrides else read_config(config.model_dump(mode="json"), overrides).config
    return read_config(config, overrides).config


def choose_target(config: RunConfig, *, gpu: str | None = None) -> Device:
    named = gpu or config.memory.gpu
    if named is not None:
        return find_device(named)
    return next(iter(this_machine()), None) or cpu_device()


def predict_run(
    config: RunConfig, device: Device, *, passes: Sequence[Pass] | None = None, limit_bytes: int | None = None
) -> Prediction:
    """passes: what is recorded; the heaviest steps of the configuration where left out. limit_bytes: of the whole
    device, within which the allocator works."""
    parse_allocator_config(config.memory.allocator)
    target = cuda_target(config, device)
    recorded = record_step(config, passes or heaviest_passes(config, device), target=target)
    return (
        _on_cpu(config, device, recorded, limit_bytes)
        if target is None
        else _on_card(config, device, recorded, limit_bytes)
    )


def cuda_target(config: RunConfig, device: Device) -> CudaTarget | None:
    if device.kind == "cpu":
        return None
    return CudaTarget(device.compute_capability or UNKNOWN_CAPABILITY, config.model.attention)


def rows_per_micro_batch(config: RunConfig, device: Device, row_tokens: int) -> int:
    """Of the longest rows."""
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


def _on_card(config: RunConfig, device: Device, recorded: RecordedStep, limit_bytes: int | None) -> Prediction:
    context = device.context or context_prior(device.compute_capability or UNKNOWN_CAPABILITY)
    others = max(0, (device.used_bytes or 0))
    settings = ReplaySettings(allocator=config.memory.allocator, total_bytes=device.total_bytes * 64)
    free = replay(recorded.trace, settings)
    device_bytes = free.peak_reserved_bytes + context.expected_bytes
    result, fits = free, True
    if limit_bytes is not None and device_bytes > limit_bytes:
        tight = replay(
            recorded.trace,
            ReplaySettings(
                allocator=config.memory.allocator,
                total_bytes=limit_bytes,
                used_by_others_bytes=min(context.expected_bytes, limit_bytes),
            ),
        )
        fits = tight.num_ooms == 0
        result = tight if fits else free
    reasons = [
        f"the CUDA context holds {format_bytes(context.low_bytes)} to {format_bytes(context.high_bytes)} on cards of "
        "this family"
    ]
    if others:
        reasons.append(f"{format_bytes(others)} of the card are in use by others")
    return _prediction(
        recorded,
        find_peak(recorded.trace, settings),
        device,
        result=result,
        context=(context.low_bytes, context.expected_bytes, context.high_bytes),
        reserved=(result.peak_reserved_bytes,) * 3,
        reasons=reasons,
        fits=fits,
    )


def _on_cpu(config: RunConfig, device: Device, recorded: RecordedStep, limit_bytes: int | None) -> Prediction:
    peak, factor = find_peak(recorded.trace, None), allocator_factor()
    low, expected, high = (int(peak.allocated_bytes * f) for f in (factor.low, factor.expected, factor.high))
    baseline = psutil.Process().memory_info().rss
    reasons = [
        f"the C library ({factor.name}) was measured to hold {factor.low:.2f} to {factor.high:.2f} times the live bytes",
        "the program itself is counted as large as it is now",
    ]
    return _prediction(
        recorded,
        peak,
        device,
        result=None,
        context=(baseline,) * 3,
        reserved=(low, expected, high),
        reasons=reasons,
        fits=limit_bytes is None or expected + baseline <= limit_bytes,
    )


def _prediction(
    recorded: RecordedStep,
    peak: Peak,
    device: Device,
    *,
    result: ReplayResult | None,
    context: tuple[int, int, int],
    reserved: tuple[int, int, int],
    reasons: Sequence[str],
    fits: bool,
) -> Prediction:
    evaluation = recorded.evaluation_step
    return Prediction(
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=reserved[1],
        device_bytes=reserved[1] + context[1],
        context_bytes=context[1],
        low_bytes=reserved[0] + context[0],
        high_bytes=reserved[2] + context[2],
        reasons=tuple(reasons),
        categories=peak.categories,
        peak_phase="evaluation" if peak.event.step == evaluation else peak.event.phase,
        peak_module=peak.event.module,
        alive=peak.alive[:SHOWN_ALIVE],
        evaluation_allocated_bytes=None if evaluation is None else peak.by_step[evaluation],
        num_alloc_retries=0 if result is None else result.num_alloc_retries,
        fits=fits,
        recorded=recorded,
        device=device,
    )
