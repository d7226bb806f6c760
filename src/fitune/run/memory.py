"""Reads memory.jsonl: memory over time and the state of the device, two lines a second."""

from dataclasses import dataclass
from pathlib import Path

from fitune.run.metrics import read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """One moment of a run. What is unknown is None, or left out of the line."""

    #: seconds since 1970
    time: float
    #: the last finished step
    step: int
    #: the fraction of the run that is done
    progress_fraction: float | None = None
    #: PyTorch's, now
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    #: the largest in the present step and in those that ended since the line before
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    #: PyTorch's counters since the process started
    num_retries: int | None = None
    num_ooms: int | None = None
    #: parameters, gradients and optimizer state
    state_bytes: int | None = None
    #: of the host's memory
    process_bytes: int | None = None
    peak_process_bytes: int | None = None
    #: on a CPU: what the process used before training, without the parameters
    program_bytes: int | None = None
    #: the card as NVML reports it; on a CPU the host, within the limit of its control group
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None
    #: of the device
    other_processes_bytes: int | None = None
    #: of this process, in system memory instead of the card (Windows, WSL), or swapped out (CPU)
    spill_bytes: int | None = None
    utilisation_fraction: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    #: why the card is slowed down; '' if it is not
    throttled: str | None = None
    #: of the disk with the run's directory
    disk_free_bytes: int | None = None


def read_run_memory(path: Path) -> tuple[MemorySample, ...]:
    """Read the samples in the order written, without damaged lines.

    Raises RunDirectoryError if the file cannot be opened.
    """
    return tuple(read_records(path, MemorySample))
