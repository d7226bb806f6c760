"""Predict the memory that a trace takes on a card, and whether it fits.

The result covers allocated and reserved memory of PyTorch and the memory used on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from fitune.allocator.peaks import Living, Peak, step_peaks
from fitune.allocator.replay import FailedAllocation, ReplaySettings
from fitune.allocator.replay import replay as replay_trace
from fitune.allocator.rules import MIN_BLOCK_BYTES
from fitune.config import Routing
from fitune.display import HtmlDisplay
from fitune.language import say
from fitune.machine.cards import Device
from fitune.recorder.events import COMPILED, ROUTED, Category, MemoryTrace, Phase
from fitune.units import MIB, format_bytes

#: Relative differences between prediction and measurement that are expected
CUDA_TOLERANCE = 0.02
CPU_TOLERANCE = 0.12
#: Allowance for code pages, thread stacks and buffers that the first steps of a process touch;
#: these took 6 MiB for a model of 1 MiB
CPU_NOISE_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictSettings:
    """The card and allocator settings for a prediction."""

    #: with None there is no limit, and nothing outside PyTorch is known
    device: Device | None = None
    #: the value of PYTORCH_ALLOC_CONF
    allocator: str = ""
    #: the share of the card that PyTorch may reserve
    memory_fraction: float | None = None
    #: size of a block that a loader allocates and frees before the trace
    warm_up_bytes: int = 0
    #: whether to look for the first allocation that fails when the tensors alone are too large
    find_oom: bool = True


@dataclass(frozen=True, slots=True)
class Interval:
    """The range of device memory that is expected, and why it is not a single number."""

    low_bytes: int
    high_bytes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepPeak:
    """The peaks of one step; they are reset when the step begins."""

    step: int
    phase: Phase
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Prediction(HtmlDisplay):
    """The predicted memory of the last step of a trace.

    By then gradients and optimizer state have reached their final size.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    #: what nvidia-smi will show for the process: reserved memory and the CUDA context; None where
    #: the context is unknown
    device_bytes: int | None
    device_interval: Interval | None
    #: live bytes of each category; they add up to peak_allocated_bytes
    categories: Mapping[Category, int]
    peak_phase: Phase
    modules: tuple[Living, ...]
    tensors: tuple[Living, ...]
    #: None without a device, and where only an upper bound is known (torch.compile) and it exceeds
    #: the device's memory
    fits: bool | None
    #: how often the allocator has to empty its cache to fit
    num_alloc_retries: int
    #: the first allocation that fails, if it does not fit
    first_oom: FailedAllocation | None
    assumptions: tuple[str, ...]
    #: of each step that was to be predicted, the last one included
    step_peaks: tuple[StepPeak, ...] = ()

    def __repr__(self) -> str:
        """Return the prediction in one sentence of text; the fields hold all of it."""
        parts = ", ".join(
            f"{say(name)} {format_bytes(size)}" for name, size in self.categories.items() if size
        )
        sums = [f"{say('allocated')} {format_bytes(self.peak_allocated_bytes)}"]
        sums.append(f"{say('reserved')} {format_bytes(self.peak_reserved_bytes)}")
        if self.device_bytes is not None:
            sums.append(f"{say('device used')} {format_bytes(self.device_bytes)}")
        verdict = {True: f" · {say('fits')}", False: f" · {say('does not fit')}", None: ""}[
            self.fits
        ]
        peak = say("at the peak ({phase})", phase=say(self.peak_phase))
        return f"Prediction: {', '.join(sums)}{verdict} · {peak}: {parts}"


def peak_json(prediction: Prediction) -> dict[str, object]:
    """Return what is live at the peak, for `write_json`."""
    return {
        "schema": 1,
        "peak_phase": prediction.peak_phase,
        "categories": dict(prediction.categories),
        "modules": [asdict(each) for each in prediction.modules],
        "tensors": [asdict(each) for each in prediction.tensors],
    }


def predict_trace(trace: MemoryTrace, settings: PredictSettings) -> Prediction:
    """Predict the last step of the trace, with the peaks of all steps.

    The trace is replayed without a limit first, and again with the card's limit if the first replay
    does not fit.

    Raises UsageError for a trace without events or for allocator settings that cannot be used.
    """
    last_step = int(trace.columns().step.max()) if trace.events else 0
    *before, last = predict_steps(trace, settings, range(1, last_step + 1) or (0,))
    return replace(
        last, step_peaks=tuple(each for step in (*before, last) for each in step.step_peaks)
    )


def either_routing(predict_routed: Callable[[Routing], Prediction], routing: Routing) -> Prediction:
    """Return the prediction for this routing of tokens to experts.

    If the routing changes the memory, the interval is extended to include that of the other
    routing.
    """
    prediction = predict_routed(routing)
    own = prediction.device_interval
    if own is None or ROUTED[routing] not in prediction.assumptions:
        return prediction
    other = predict_routed(other_routing(routing)).device_interval
    assert other is not None
    reason = "tokens go to the experts evenly or all to the same ones, as the router is trained"
    interval = Interval(
        min(own.low_bytes, other.low_bytes),
        max(own.high_bytes, other.high_bytes),
        (*own.reasons, reason),
    )
    return replace(prediction, device_interval=interval)


def other_routing(routing: Routing) -> Routing:
    return "worst" if routing == "balanced" else "balanced"


def predict_steps(
    trace: MemoryTrace, settings: PredictSettings, steps: Sequence[int]
) -> list[Prediction]:
    """Predict each of these steps as if the loop ended with it.

    If the replay without a limit is too large, one replay with the card's limit serves all steps.
    """
    predictions = _predict_steps(trace, settings, steps)
    if COMPILED not in trace.source:
        return predictions
    return [
        each if each.fits is not False else replace(each, fits=None, first_oom=None)
        for each in predictions
    ]


def _predict_steps(
    trace: MemoryTrace, settings: PredictSettings, steps: Sequence[int]
) -> list[Prediction]:
    device = settings.device
    if device is not None and device.kind == "cpu":
        peaks = step_peaks(trace, steps)
        return [_on_cpu(peaks[step], trace, device) for step in steps]
    unlimited = ReplaySettings(allocator=settings.allocator, warm_up_bytes=settings.warm_up_bytes)
    result = replay_trace(trace, unlimited)
    peaks = step_peaks(trace, steps, allocated_changes=result.allocated_changes)
    if device is None:
        return [
            _step_prediction(result.step_peaks[step][1], trace, None, peaks[step]) for step in steps
        ]
    context = device.context.expected_bytes if device.context else 0
    limit_bytes = (settings.memory_fraction or 1.0) * device.total_bytes

    def reserved_until(last: int) -> int:
        return max(reserved for step, (_, reserved) in result.step_peaks.items() if step <= last)

    too_large = [step for step in steps if reserved_until(step) + context > limit_bytes]
    limited = result
    # Steps whose tensors alone exceed the limit need no second replay.
    hopeless = []
    if not settings.find_oom:
        hopeless = [s for s in too_large if _least_bytes(trace, s) + context > limit_bytes]
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
            prediction = _step_prediction(result.step_peaks[step][1], trace, device, peaks[step])
            predictions.append(replace(prediction, fits=False))
            continue
        within = limited if step in too_large else result
        failure = within.first_oom
        if (
            failure is not None
            and failure.event is not None
            and trace.events[failure.event].step > step
        ):
            failure = None
        reserved = (within if failure is None else result).step_peaks[step][1]
        retries = within.step_retries[step] if failure is None else within.num_alloc_retries
        prediction = _step_prediction(reserved, trace, device, peaks[step])
        predictions.append(
            replace(prediction, fits=failure is None, num_alloc_retries=retries, first_oom=failure)
        )
    return predictions


def _least_bytes(trace: MemoryTrace, step: int) -> int:
    """Return the allocated bytes at the peak up to the end of `step`, without any fragmentation."""
    columns = trace.columns()
    blocks = -(-np.abs(columns.num_bytes) // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    return int(np.cumsum(np.sign(columns.num_bytes) * blocks)[columns.step <= step].max())


def _step_prediction(
    reserved: int, trace: MemoryTrace, device: Device | None, peak: Peak
) -> Prediction:
    return Prediction(
        peak_allocated_bytes=peak.num_bytes,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + device.context.expected_bytes
        if device and device.context
        else None,
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
    """Predict the process's memory on a CPU, where no caching allocator rounds the requested bytes.

    What the process holds apart from tensors is not included.
    """
    fits = None if device.free_bytes is None else peak.num_bytes <= device.free_bytes
    return replace(_step_prediction(peak.num_bytes, trace, None, peak), fits=fits)


def _interval(reserved_bytes: int, device: Device | None) -> Interval | None:
    if device is None or device.context is None:
        return None
    low, high = device.context.low_bytes, device.context.high_bytes
    takes = f"takes {low / 2**20:.0f} to {high / 2**20:.0f} MiB, by driver and version"
    if low == high:
        takes = f"was measured to take {low / 2**20:.0f} MiB"
    reason = f"the CUDA context of such a card {takes}"
    return Interval(reserved_bytes + low, reserved_bytes + high, (reason,))
