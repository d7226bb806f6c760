"""Decides what is worth a warning during a run, from its memory samples and steps alone.

An alarm is raised when its condition begins, not as long as it lasts, and not again within
QUIET_SECONDS. Two conditions are checked by the training loop instead: a loss that is not a number
(`not_finite`), and a second step that differs from its prediction (`memory_differs`).
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from fitune.allocator.prediction import CPU_NOISE_BYTES, CPU_TOLERANCE, CUDA_TOLERANCE
from fitune.run.memory import MemorySample
from fitune.run.metrics import RunEvent, StepMetrics
from fitune.units import GIB, MIB, format_bytes

QUIET_SECONDS = 300.0
#: The fraction of a card's reserved memory that may be fragmented by steps of different lengths.
#: The planned steps all have the same length.
FRAGMENTATION = 0.03
WINDOW_STEPS = 50
FEWEST_STEPS = 20
WARM_UP_STEPS = 5
LEAK_WINDOW_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class AlarmSettings:
    """What the alarms need to know about a run."""

    #: the largest gradient norm; 0 for no clipping
    clip: float
    #: whether the device is the host, whose numbers fluctuate more
    on_cpu: bool
    #: the size of one save on the disk
    save_bytes: int
    #: what PyTorch will reserve at most (on a CPU: the tensors' part of the resident peak), if the
    #: run has a plan
    predicted_bytes: int | None = None

    @property
    def most_bytes(self) -> float:
        """The largest memory of a step that the prediction and its tolerance allow."""
        if self.predicted_bytes is None:
            return math.inf
        tolerance = CPU_TOLERANCE if self.on_cpu else CUDA_TOLERANCE + FRAGMENTATION
        return max(
            self.predicted_bytes * (1 + tolerance),
            self.predicted_bytes + CPU_NOISE_BYTES * self.on_cpu,
        )


class Alarms:
    """Checks every sample and every step, and returns the alarms that they raise."""

    def __init__(self, settings: AlarmSettings) -> None:
        self._settings = settings
        self._active: set[str] = set()
        self._last_raised: dict[str, float] = {}
        self._step_peak_bytes = 0
        self._others_bytes: int | None = None
        self._num_retries = 0
        self._spilled = False
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._clipped: deque[bool] = deque(maxlen=WINDOW_STEPS)
        self._held: deque[int] = deque(maxlen=3 * LEAK_WINDOW_STEPS)
        self._slack: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._first_slack: float | None = None

    def sample(self, sample: MemorySample) -> list[RunEvent]:
        checks = {
            "headroom": self._headroom(sample),
            "other_processes": self._other_processes(sample),
            "spill": self._spill(sample),
            "retry": self._retries(sample),
            "disk": self._disk(sample),
        }
        return list(self._raised(checks, step=sample.step, now=sample.time))

    def step(self, metrics: StepMetrics, *, held_bytes: int | None, now: float) -> list[RunEvent]:
        """Check a step.

        held_bytes: what is allocated (on a CPU: resident) between this step and the next one.
        """
        self._step_peak_bytes = metrics.peak_allocated_bytes or 0
        checks = {
            "leak": self._leak(held_bytes) if metrics.step > WARM_UP_STEPS else None,
            "fragmentation": self._fragmentation(metrics) if metrics.step > WARM_UP_STEPS else None,
            "prediction": self._prediction(metrics),
            "loss_spike": self._loss_spike(metrics),
            "clipping": self._clipping(metrics),
        }
        return list(self._raised(checks, step=metrics.step, now=now))

    def _raised(
        self, checks: dict[str, str | None], *, step: int, now: float
    ) -> Iterator[RunEvent]:
        for kind, message in checks.items():
            if message is None:
                self._active.discard(kind)
            elif kind not in self._active:
                self._active.add(kind)
                if now - self._last_raised.get(kind, -math.inf) >= QUIET_SECONDS:
                    self._last_raised[kind] = now
                    yield RunEvent(time=now, step=step, kind=kind, message=f"warning: {message}")

    def _headroom(self, sample: MemorySample) -> str | None:
        """Check the free memory, in which cached memory that PyTorch can give back is included."""
        if sample.device_total_bytes is None or sample.device_used_bytes is None:
            return None
        needed = max(self._step_peak_bytes, sample.peak_allocated_bytes or 0)
        reclaimable = max(0, (sample.reserved_bytes or 0) - needed)
        left = sample.device_total_bytes - sample.device_used_bytes + reclaimable
        margin = min(max(sample.device_total_bytes // 50, 128 * MIB), 512 * MIB)
        if left >= margin:
            return None
        return (
            f"only {format_bytes(left)} of {format_bytes(sample.device_total_bytes)} are left: "
            "end what else uses this memory, or lower batch.micro_tokens or batch.micro"
        )

    def _other_processes(self, sample: MemorySample) -> str | None:
        others, total = sample.other_processes_bytes, sample.device_total_bytes
        if others is None or total is None:
            return None
        before = self._others_bytes
        if before is None or others < before:
            self._others_bytes = others
            return None
        grown = total // 10 if self._settings.on_cpu else max(256 * MIB, total // 50)
        if others - before < grown:
            return None
        self._others_bytes = others
        return f"other processes took {format_bytes(others - before)} more: they now hold {format_bytes(others)}"

    def _spill(self, sample: MemorySample) -> str | None:
        """Check for memory that spilled into system memory, in two samples in a row.

        Device and process are not read at the same instant, so a single sample may be inconsistent.
        """
        before, self._spilled = self._spilled, (sample.spill_bytes or 0) >= 64 * MIB
        if not (before and self._spilled):
            return None
        if self._settings.on_cpu:
            return f"{format_bytes(sample.spill_bytes)} are swapped out, which makes steps slow: lower batch.micro_tokens"
        return (
            f"{format_bytes(sample.spill_bytes)} lie in system memory instead of the card, which makes steps slow: "
            "lower batch.micro_tokens, or forbid it in NVIDIA's control panel (CUDA - Sysmem Fallback Policy)"
        )

    def _retries(self, sample: MemorySample) -> str | None:
        new = (sample.num_retries or 0) - self._num_retries
        self._num_retries += new
        if new <= 0:
            return None
        return f"PyTorch had to empty its cache {new} times to go on: memory is scarce, and such steps are slow"

    def _disk(self, sample: MemorySample) -> str | None:
        needed = max(2 * self._settings.save_bytes, GIB)
        if sample.disk_free_bytes is None or sample.disk_free_bytes >= needed:
            return None
        return (
            f"{format_bytes(sample.disk_free_bytes)} are free where the run is kept, and two saves take "
            f"{format_bytes(2 * self._settings.save_bytes)}: make room"
        )

    def _leak(self, held_bytes: int | None) -> str | None:
        """Check whether the minimum held in a window of steps grows from window to window.

        It must grow twice.
        """
        if held_bytes is None:
            return None
        self._held.append(held_bytes)
        if len(self._held) < 3 * LEAK_WINDOW_STEPS:
            return None
        held = list(self._held)
        first, second, third = (
            min(held[start : start + LEAK_WINDOW_STEPS]) for start in range(0, 30, 10)
        )
        least = max(64 * MIB, first // 20) if self._settings.on_cpu else max(MIB, first // 100)
        if second - first < least or third - second < least:
            return None
        growth = (third - first) // (2 * LEAK_WINDOW_STEPS)
        return f"what is held between steps grows by {format_bytes(growth)} a step: something keeps what it should free"

    def _fragmentation(self, metrics: StepMetrics) -> str | None:
        """Compare the fraction of reserved memory that no step uses with that of the first steps.

        It is the minimum over a window of steps, because a single short step uses little memory.
        """
        allocated, reserved = metrics.peak_allocated_bytes, metrics.peak_reserved_bytes
        if not allocated or not reserved:
            return None
        self._slack.append(1 - allocated / reserved)
        slack = min(self._slack)
        if self._first_slack is None and len(self._slack) == FEWEST_STEPS:
            self._first_slack = slack
        if self._first_slack is None or len(self._slack) < WINDOW_STEPS:
            return None
        if slack < max(0.2, self._first_slack + 0.1):
            return None
        return (
            f"{slack:.0%} of PyTorch's reserved memory is in pieces no step uses, {self._first_slack:.0%} at first: "
            "try memory.allocator=expandable_segments:True"
        )

    def _prediction(self, metrics: StepMetrics) -> str | None:
        predicted, measured = self._settings.predicted_bytes, metrics.peak_reserved_bytes
        if predicted is None or measured is None or measured <= self._settings.most_bytes:
            return None
        return (
            f"step {metrics.step} took {format_bytes(measured)}, {measured / predicted - 1:.1%} more than the "
            f"{format_bytes(predicted)} of the plan"
        )

    def _loss_spike(self, metrics: StepMetrics) -> str | None:
        """Check whether the loss is far above the median of the steps before.

        Far means six standard deviations and 30 %. The standard deviation is estimated by the
        median absolute deviation (times 1.4826 for a normal distribution).
        """
        before = list(self._losses)
        if math.isfinite(metrics.loss):
            self._losses.append(metrics.loss)
        if len(before) < FEWEST_STEPS or not math.isfinite(metrics.loss):
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in before)
        if metrics.loss <= median + max(6 * deviation, 0.3 * abs(median)):
            return None
        return (
            f"the loss of step {metrics.step} is {metrics.loss:.3g}, after a median of {median:.3g} in the "
            f"{len(before)} steps before: look at its samples, or lower optim.lr"
        )

    def _clipping(self, metrics: StepMetrics) -> str | None:
        if self._settings.clip == 0:
            return None
        self._clipped.append(metrics.grad_norm > self._settings.clip)
        share = sum(self._clipped) / len(self._clipped)
        if len(self._clipped) < WINDOW_STEPS or share <= 0.5:
            return None
        return (
            f"{share:.0%} of the last {WINDOW_STEPS} steps had their gradient clipped at optim.clip "
            f"{self._settings.clip:g}: the rate that acts is below optim.lr"
        )
