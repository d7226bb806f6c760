"""Watches a run: a thread samples its memory and raises alarms, and trackers follow the run.

The thread writes memory.jsonl twice a second. It does no work on the device and does not wait for
the device, and it neither ends nor slows down a run.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from fitune.boundary import parse_json
from fitune.config import RunConfig
from fitune.distributed.sharding import local
from fitune.errors import RunDirectoryError
from fitune.plain_files import read_plain
from fitune.run.directory import RunDirectory
from fitune.run.memory import MemorySample
from fitune.run.metrics import EvalMetrics, RunEvent, StepMetrics
from fitune.run.patient_files import PatientFiles
from fitune.run.watcher import Watcher, Watchers
from fitune.step.assemble import Setup
from fitune.units import MIB
from fitune.watch.alarms import Alarms, AlarmSettings
from fitune.watch.prometheus import write_prometheus
from fitune.watch.sampler import Sampler
from fitune.watch.trackers import open_trackers

SAMPLE_SECONDS = 0.5
PROMETHEUS_SECONDS = 5.0
#: the samples of some hours
MOST_WAITING_BYTES = 8 * MIB
STATE_EVERY_STEPS = 100


@contextmanager
def watched(
    config: RunConfig, setup: Setup, run: RunDirectory, *, watcher: Watcher
) -> Iterator[Watcher]:
    """Add the monitor and the configured trackers to a watcher.

    Raises what a tracker raises that cannot start.
    """
    with ExitStack() as opened:
        others = Watchers(
            (watcher, *opened.enter_context(open_trackers(config, run, notify=watcher.note)))
        )
        monitor = opened.enter_context(run_monitor(config, setup, run, notify=others.note))
        yield Watchers((*others.watchers, monitor))


def run_monitor(
    config: RunConfig, setup: Setup, run: RunDirectory, *, notify: Callable[[str], None]
) -> "Monitor":
    """Create the monitor of a run that fitune's own loop trains."""
    parameters = list(setup.model.parameters())
    saved = (
        parameters if config.model.method == "full" else [p for p in parameters if p.requires_grad]
    )
    alarms = AlarmSettings(
        clip=config.optim.clip,
        on_cpu=parameters[0].device.type == "cpu",
        save_bytes=sum(parameter.nbytes for parameter in saved),
        predicted_bytes=_planned_bytes(run.plan),
    )
    prometheus = None if config.run.prometheus is None else Path(config.run.prometheus)
    settings = MonitorSettings(alarms, prometheus)
    return Monitor(run, setup.model, setup.optimizer, settings=settings, notify=notify)


@dataclass(frozen=True)
class MonitorSettings:
    """The settings of a monitor."""

    alarms: AlarmSettings
    #: the file for Prometheus' textfile collector
    prometheus: Path | None = None
    #: what the user calls the configuration keys that alarms mention, if that is not fitune's name
    names: Mapping[str, str] = field(default_factory=dict)


class Monitor:
    """A watcher that samples memory in a thread.

    notify: is called with each alarm, in the thread that trains.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        settings: MonitorSettings,
        notify: Callable[[str], None],
    ) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer
        self._names, self._prometheus, self._notify = settings.names, settings.prometheus, notify
        self._device = next(model.parameters()).device
        self._state_bytes = sum(local(parameter).nbytes for parameter in model.parameters())
        self._sampler = Sampler(self._device, place=run.path, parameter_bytes=self._state_bytes)
        self._alarms = Alarms(settings.alarms)
        self._files = PatientFiles(most_bytes=MOST_WAITING_BYTES, drops_oldest=True)
        self._lock, self._exporting = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._sample_until_stopped, name="monitor", daemon=True
        )
        self._messages: deque[str] = deque()
        self._last: StepMetrics | None = None
        self._step = 0
        self._progress: float | None = None
        self._peaks: list[StepMetrics] = []
        self._exported, self._is_exported = 0.0, True

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._sampler.close()
        self._notify_of_alarms()

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        if self._last is None or metrics.step % STATE_EVERY_STEPS == 0:
            self._state_bytes = _state_bytes(self._model, self._optimizer, self._device)
        self.reached(metrics.step, progress=progress)
        with self._lock:
            self._last = metrics
            self._peaks.append(metrics)
            self._report(
                self._alarms.step(metrics, held_bytes=self._sampler.held_bytes(), now=time.time())
            )
        self._notify_of_alarms()

    def reached(self, step: int, *, progress: float) -> None:
        """Note that a step is done whose metrics are not known yet."""
        self._step, self._progress = step, progress

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def sample(self) -> MemorySample:
        """Sample the memory now, write the sample and check it for alarms.

        Raises RunDirectoryError if the sample cannot be written.
        """
        sample = self._sampler.read(
            step=self._step, progress=self._progress, state_bytes=self._state_bytes
        )
        with self._lock:
            for metrics in self._peaks:
                sample = _with_peaks(sample, metrics)
            self._peaks.clear()
            self._report(self._alarms.sample(sample))
        self._files.append(self._run.memory, sample, leave_out_unknown=True)
        if sample.time - self._exported >= PROMETHEUS_SECONDS:
            self._exported = sample.time
            self._export(sample)
        return sample

    def _export(self, sample: MemorySample) -> None:
        with self._exporting:  # another lock than the one that steps wait for: the disk may be slow
            if self._prometheus is None:
                return
            try:
                write_prometheus(
                    self._prometheus, self._run.name, sample=sample, metrics=self._last
                )
                self._is_exported = True
            except RunDirectoryError:
                if self._is_exported:
                    self._messages.append(
                        f"warning: run.prometheus {self._prometheus} cannot be written: it is tried again every "
                        f"{PROMETHEUS_SECONDS:.0f} s"
                    )
                self._is_exported = False

    def _sample_until_stopped(self) -> None:
        is_running = True
        try:
            while is_running:
                start = time.perf_counter()
                self.sample()
                is_running = not self._stopped.wait(
                    max(0.0, SAMPLE_SECONDS - (time.perf_counter() - start))
                )
            self._exported = 0.0
            self.sample()
        except Exception as error:  # a driver may fail in any way, which must not end the training
            self._messages.append(f"warning: memory is no longer recorded: {error}")

    def _report(self, events: list[RunEvent]) -> None:
        """Write alarms to the run's directory at once, so that they are there if the run dies."""
        for event in events:
            for name, other in self._names.items():
                event = replace(event, message=event.message.replace(name, other))
            self._messages.append(event.message)
            # the training loop meets the same fault when it writes, and ends the run
            with suppress(RunDirectoryError):
                self._files.append(self._run.events, event)

    def _notify_of_alarms(self) -> None:
        while self._messages:
            self._notify(self._messages.popleft())


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Return the bytes of parameters, buffers, gradients and optimizer state on the device."""
    parameters = list(model.parameters())
    state = (tensor for tensors in optimizer.state.values() for tensor in tensors.values())
    gradients = [parameter for parameter in parameters if parameter.requires_grad]
    held = [*parameters, *gradients, *model.buffers(), *state]
    return sum(local(t).nbytes for t in held if isinstance(t, torch.Tensor) and t.device == device)


def _with_peaks(sample: MemorySample, metrics: StepMetrics) -> MemorySample:
    """Add the peaks of a step that ended since the previous sample.

    On a CPU the step's device memory is the process's memory.
    """
    on_cpu = sample.allocated_bytes is None
    return replace(
        sample,
        peak_allocated_bytes=_larger(
            sample.peak_allocated_bytes, None if on_cpu else metrics.peak_allocated_bytes
        ),
        peak_reserved_bytes=_larger(
            sample.peak_reserved_bytes, None if on_cpu else metrics.peak_reserved_bytes
        ),
        peak_process_bytes=_larger(
            sample.peak_process_bytes, metrics.device_used_bytes if on_cpu else None
        ),
    )


def _larger(first: int | None, second: int | None) -> int | None:
    return max((value for value in (first, second) if value is not None), default=None)


def _planned_bytes(path: Path) -> int | None:
    """Return what the run's plan reserves at its peak; None if there is no such plan."""
    try:
        plan = parse_json(read_plain(path))
        return int(plan["candidates"][plan["chosen"]]["predicted_reserved_bytes"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
