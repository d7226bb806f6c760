"""Reads the memory that a run's device and process use now, from PyTorch, the driver and the host.

A CUDA card is read through NVML or, where that is missing (AMD), through PyTorch. On a CPU the host
is the device, and the process's resident set is what the training uses of it.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from fitune.machine.cards import context_prior
from fitune.machine.devices import cpu_device
from fitune.machine.nvml import CardState, card_reader
from fitune.machine.process_memory import read_peak
from fitune.run.memory import MemorySample

_CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")


class Sampler:
    """Reads memory samples during a run.

    place: a directory on the disk whose free space is sampled.
    """

    def __init__(self, device: torch.device, *, place: Path, parameter_bytes: int) -> None:
        self._device, self._place = device, place
        self._process = psutil.Process()
        # what the process used before training, without the parameters
        self._program_bytes = max(0, self.process_bytes() - parameter_bytes)
        self._opened = ExitStack()
        self._read_card: Callable[[], CardState] | None = None
        if device.type == "cuda":
            uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "unknown"))
            self._read_card = self._opened.enter_context(card_reader(uuid, device.index or 0))
        psutil.cpu_percent()  # the first value is meaningless

    def close(self) -> None:
        self._opened.close()

    def held_bytes(self) -> int:
        """Return the bytes that the run has allocated (on a CPU: resident) now."""
        return (
            torch.cuda.memory_allocated(self._device)
            if self._device.type == "cuda"
            else self.process_bytes()
        )

    def process_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def read(self, *, step: int, progress: float | None, state_bytes: int) -> MemorySample:
        read = {"cuda": self._cuda, "mps": _mps}.get(self._device.type, self._cpu)
        disk_free_bytes = None
        with suppress(OSError):
            disk_free_bytes = shutil.disk_usage(self._place).free
        return MemorySample(
            time=time.time(),
            step=step,
            progress_fraction=progress,
            state_bytes=state_bytes,
            process_bytes=self.process_bytes(),
            peak_process_bytes=read_peak(_CPU).device_bytes,
            disk_free_bytes=disk_free_bytes,
            **read(),
        )

    def _cuda(self) -> dict[str, Any]:
        card = CardState() if self._read_card is None else self._read_card()
        numbers = {
            "utilisation_fraction": card.utilisation_fraction,
            "power_watts": card.power_watts,
            "temperature_celsius": card.temperature_celsius,
            "throttled": card.throttled,
        }
        if torch.version.hip is not None:
            numbers = _amd(self._device)
        counters = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved = counters["allocated_bytes"]["all"], counters["reserved_bytes"]["all"]
        if card.memory is not None:
            used, total = card.memory.used_bytes, card.memory.total_bytes
        else:
            free, total = torch.cuda.mem_get_info(self._device)
            used = total - free
        own = {process.pid: process.used_bytes for process in card.processes}.get(os.getpid())
        # unknown on WSL and Windows, or listed with the process id of another container
        if own is None:
            own = (
                reserved["current"]
                + context_prior(torch.cuda.get_device_capability(self._device)).expected_bytes
            )
        return numbers | {
            "allocated_bytes": allocated["current"],
            "peak_allocated_bytes": allocated["peak"],
            "reserved_bytes": reserved["current"],
            "peak_reserved_bytes": reserved["peak"],
            "num_retries": counters["num_alloc_retries"],
            "num_ooms": counters["num_ooms"],
            "device_used_bytes": used,
            "device_total_bytes": total,
            "other_processes_bytes": max(0, used - own),
            "spill_bytes": max(0, reserved["current"] - used),
        }

    def _cpu(self) -> dict[str, Any]:
        host = cpu_device()
        used = host.used_bytes or 0
        return {
            "program_bytes": self._program_bytes,
            "device_used_bytes": used,
            "device_total_bytes": host.total_bytes,
            "other_processes_bytes": max(0, used - self.process_bytes()),
            "spill_bytes": _swapped_bytes(),
            "utilisation_fraction": psutil.cpu_percent() / 100,
        }


def _amd(device: torch.device) -> dict[str, Any]:
    """Read an AMD card; PyTorch uses amdsmi, which may not be installed."""
    numbers: dict[str, object] = {}
    with suppress(Exception):
        numbers["utilisation_fraction"] = torch.cuda.utilization(device) / 100
        numbers["power_watts"] = torch.cuda.power_draw(device) / 1000
        numbers["temperature_celsius"] = float(torch.cuda.temperature(device))
    return numbers


def _mps() -> dict[str, Any]:
    """Read Apple's unified memory; its total is what the system recommends for the GPU."""
    held = torch.mps.driver_allocated_memory()
    return {
        "allocated_bytes": torch.mps.current_allocated_memory(),
        "reserved_bytes": held,
        "device_used_bytes": held,
        "device_total_bytes": torch.mps.recommended_max_memory(),
    }


def _swapped_bytes() -> int | None:
    """Return how much of this process is swapped out, on Linux."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmSwap:"):
                return int(line.split()[1]) * 1024
    return None
