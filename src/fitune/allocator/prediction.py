"""What a trace will take on a card: allocated and reserved by PyTorch, used on the device, and whether it fits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fitune.allocator.peaks import Living, Peak, step_peaks
from fitune.allocator.replay import FailedAllocation, ReplaySettings
from fitune.allocator.replay import replay as replay_trace
from fitune.allocator.rules import MIN_BLOCK_BYTES
from fitune.config import Routing
from fitune.display import HtmlDisplay
from fitune.language import say
from fitune.machine.cards import Device
from fitune.trace.events import COMPILED, ROUTED, Category, MemoryTrace, Phase
from fitune.units import MIB, format_bytes

#: Relative differences between a prediction and a measurement that are no fault of either.
CUDA_TOLERANCE = 0.02
CPU_TOLERANCE = 0.12
#: Code pages, thread stacks and buffers that the first steps of a process touch: 6 MiB for a model of 1 MiB.
CPU_NOISE_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictSettings:
    """The card, the value of PYTORCH_ALLOC_CONF, the share of the card that PyTorch may reserve, and the block that a
    loader allocates and frees before the trace. device None: no limit, and nothing outside PyTorch is known.
    find_oom: whether to look for the first allocation that fails, where the tensors alone are too large."""

    device: Device | None = None
    allocator: str = ""
    memory_fraction: float | None = None
    warm_up_bytes: int = 0
    find_oom: bool = True


@dataclass(frozen=True, slots=True)
class Interval:
    low_bytes: int
    high_bytes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepPeak:
    """Of one step, for which the peaks are reset when it begins."""

    step: int
    phase: Phase
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Prediction(HtmlDisplay):
    """All of the last step of the trace, when optimizer state and gradients have settled.

    device_bytes: what nvidia-smi will show for the process, reserved + CUDA context; None where the context is unknown.
    categories add up to peak_allocated_bytes. fits: None without a device, and where an upper bound alone is known and
    exceeds it (torch.compile). num_alloc_retries: how often the cache has
    to be emptied to fit. first_oom: the allocation that fails where it does not fit.
    step_peaks: of each step that was asked for, the last one among them.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int | None
    device_interval: Interval | None
    categories: Mapping[Category, int]
    peak_phase: Phase
    modules: tuple[Living, ...]
    tensors: tuple[Living, ...]
    fits: bool | None
    num_alloc_retries: int
    first_oom: FailedAllocation | None
    assumptions: tuple[str, ...]
    step_peaks: tuple[StepPeak, ...] = ()

    def __repr__(self) -> str:
        """In a sentence; the fields hold all of it."""
        parts = ", ".join(f"{say(name)} {format_bytes(size)}" for name, size in self.categories.items() if size)
        sums = [f"{say('allocated')} {format_bytes(self.peak_allocated_bytes)}"]
        sums.append(f"{say('reserved')} {format_bytes(self.peak_reserved_bytes)}")
        if self.device_bytes is not None:
            sums.append(f"{say('device used')} {format_bytes(self.device_bytes)}")
        verdict = {True: f" · {say('fits')}", False: f" · {say('does not fit')}", None: ""}[self.fits]
        peak = say("at the peak ({phase})", phase=say(self.peak_phase))
        return f"Prediction: {', '.join(sums)}{verdict} · {peak}: {parts}"


def peak_json(prediction: Prediction) -> dict[str, Any]:
    """What is alive at the peak, as `write_json` takes it."""
    return {
        "schema": 1,
        "peak_phase": prediction.peak_phase,
        "categories": dict(prediction.categories),
        "modules": [asdict(each) for each in prediction.modules],
        "tensors": [asdict(each) for each in prediction.tensors],
    }


def predict_trace(trace: MemoryTrace, settings: PredictSettings) -> Prediction:
    """Of the last step, with the peaks of all steps. Replays the trace without a limit, and against the card's where
    that does not plainly fit.

    Raises UsageError for a trace without events or allocator settings that cannot be used.
    """
    last_step = int(trace.columns().step.max()) if trace.events else 0
    *before, last = predict_steps(trace, settings, range(1, last_step + 1) or (0,))
    return replace(last, step_peaks=tuple(each for step in (*before, last) for each in step.step_peaks))


def either_routing(predict_routed: Callable[[Routing], Prediction], routing: Routing) -> Prediction:
    """The prediction with that routing. Where it matters, the interval goes as far as that of the other one."""
    prediction = predict_routed(routing)
    mine = prediction.device_interval
    if mine is None or ROUTED[routing] not in prediction.assumptions:
        return prediction
    its = predict_routed(other_routing(routing)).device_interval
    assert its is not None
    reason = "tokens go to the experts evenly or all to the same ones, as the router is trained"
    interval = Interval(
        min(mine.low_bytes, its.low_bytes), max(mine.high_bytes, its.high_bytes), (*mine.reasons, reason)
    )
    return replace(prediction, device_interval=interval)


def other_routing(routing: Routing) -> Routing:
    return "worst" if routing == "balanced" else "balanced"


def predict_steps(trace: MemoryTrace, settings: PredictSettings, steps: Sequence[int]) -> list[Prediction]:
    """Predict each of these steps as if the loop ended with it.

    A replay that is too large is followed by one against the limit, for all steps at once.
    """
    predictions = _predict_steps(trace, settings, steps)
    if COMPILED not in trace.source:
        return predictions
    return [each if each.fits is not False else replace(each, fits=None, first_oom=None) for each in predictions]


def _predict_steps(trace: MemoryTrace, settings: PredictSettings, steps: Sequence[int]) -> list[Prediction]:
    device = settings.device
    if device is not None and device.kind == "cpu":
        peaks = step_peaks(trace, steps)
        return [_on_cpu(peaks[step], trace, device) for step in steps]
    unlimited = ReplaySettings(allocator=settings.allocator, warm_up_bytes=settings.warm_up_bytes)
    result = replay_trace(trace, unlimited)
    peaks = step_peaks(trace, steps, allocated_changes=result.allocated_changes)
    if device is None:
        return [_of_step(result.step_peaks[step][1], trace, None, peaks[step]) for step in steps]
    context = device.context.expected_bytes if device.context else 0
    limit_bytes = (settings.memory_fraction or 1.0) * device.total_bytes
    too_large = [
        step
        for step in steps
        if max(reserved for number, (_, reserved) in result.step_peaks.items() if number <= step) + context
        > limit_bytes
    ]
    limited = result
    hopeless = (
        [] if settings.find_oom else [step for step in too_large if _least_bytes(trace, step) + context > limit_bytes]
    )
    if len(too_large) > len(hopeless):
        limited = replay_trace(
            trace,
            replace(
                unlimited,
                total_bytes=device.total_bytes,
                used_by_others_bytes=context,
                memory_fraction=settings.memory_fraction,
                until_step=max(step for step in too_large if step not in hopeless),
            ),
        )
    predictions = []
    for step in steps:
        if step in hopeless:
            prediction = _of_step(result.step_peaks[step][1], trace, device, peaks[step])
            predictions.append(replace(prediction, fits=False))
            continue
        within = limited if step in too_large else result
        failure = within.first_oom
        if failure is not None and failure.event is not None and trace.events[failure.event].step > step:
            failure = None
        reserved = (within if failure is None else result).step_peaks[step][1]
        retries = within.step_retries[step] if failure is None else within.num_alloc_retries
        prediction = _of_step(reserved, trace, device, peaks[step])
        predictions.append(replace(prediction, fits=failure is None, num_alloc_retries=retries, first_oom=failure))
    return predictions


def _least_bytes(trace: MemoryTrace, step: int) -> int:
    """What the allocator holds at the peak up to the end of `step`, whatever it makes of its blocks."""
    columns = trace.columns()
    blocks = -(-np.abs(columns.num_bytes) // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    return int(np.cumsum(np.sign(columns.num_bytes) * blocks)[columns.step <= step].max())


def _of_step(reserved: int, trace: MemoryTrace, device: Device | None, peak: Peak) -> Prediction:
    return Prediction(
        peak_allocated_bytes=peak.num_bytes,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + device.context.expected_bytes if device and device.context else None,
        device_interval=_interval(reserved, device),
        fits=None,
        num_alloc_retries=0,
        first_oom=None,
        assumptions=trace.source,
        categories=peak.categories,
        peak_phase=peak.phase,
        modules=peak.modules,
        tensors=peak.tensors,
        step_peaks=(StepPeak(peak.step, peak.phase, peak.num_bytes, reserved),),
    )


def _on_cpu(peak: Peak, trace: MemoryTrace, device: Device) -> Prediction:
    """The process's memory: no caching allocator, the requested bytes. What the process holds besides is not in it."""
    return Prediction(
        peak_allocated_bytes=peak.num_bytes,
        peak_reserved_bytes=peak.num_bytes,
        device_bytes=None,
        device_interval=None,
        fits=None if device.free_bytes is None else peak.num_bytes <= device.free_bytes,
        num_alloc_retries=0,
        first_oom=None,
        assumptions=trace.source,
        categories=peak.categories,
        peak_phase=peak.phase,
        modules=peak.modules,
        tensors=peak.tensors,
        step_peaks=(StepPeak(peak.step, peak.phase, peak.num_bytes, peak.num_bytes),),
    )


def _interval(reserved_bytes: int, device: Device | None) -> Interval | None:
    if device is None or device.context is None:
        return None
    low, high = device.context.low_bytes, device.context.high_bytes
    takes = f"takes {low / 2**20:.0f} to {high / 2**20:.0f} MiB, by driver and version"
    if low == high:
        takes = f"was measured to take {low / 2**20:.0f} MiB"
    reason = f"the CUDA context of such a card {takes}"
    return Interval(reserved_bytes + low, reserved_bytes + high, (reason,))
