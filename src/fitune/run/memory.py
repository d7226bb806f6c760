"""memory.jsonl: memory over time and what the machine did meanwhile, two lines a second while a run goes on."""

from dataclasses import dataclass
from pathlib import Path

from fitune.run.metrics import read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """One moment of a run. Unknown is None, or left out of the line.

    time: seconds since 1970. step: the last one done. progress_fraction: the share of the run that is done.
    allocated_bytes, reserved_bytes: PyTorch's, now. peak_*: the largest of the step that is going on and of those that
    ended since the line before. num_retries, num_ooms: PyTorch's, since the process started. state_bytes: parameters,
    gradients and optimizer state.
    process_bytes: what the process holds in the host's memory. program_bytes: the part of it that was there before
    training, without the parameters; on a CPU only, where it shares the device with the tensors.
    device_*: the card as NVML tells it; on a CPU the host, within the limit of its control group.
    other_processes_bytes: of the device. spill_bytes: of this process, in system memory instead of the card (Windows,
    WSL) or swapped out (CPU). throttled: why the card is slowed down, '' where it is not. disk_free_bytes: where the
    run is kept.
    """

    time: float
    step: int
    progress_fraction: float | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    num_retries: int | None = None
    num_ooms: int | None = None
    state_bytes: int | None = None
    process_bytes: int | None = None
    peak_process_bytes: int | None = None
    program_bytes: int | None = None
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None
    other_processes_bytes: int | None = None
    spill_bytes: int | None = None
    utilisation_fraction: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    throttled: str | None = None
    disk_free_bytes: int | None = None


def read_run_memory(path: Path) -> tuple[MemorySample, ...]:
    """In the order written; damaged lines are left out. Raises RunDirectoryError where the file cannot be opened."""
    return tuple(read_records(path, MemorySample))
