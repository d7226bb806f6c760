"""The device that a run uses, and what it says of its own memory: the only place that asks which kind it is.

On a CPU the process is the device: its resident set is what `device` means there, and its peak can be reset (Linux).
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from fitune.machine.threads import start_thread

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_KEPT_FREE_BYTES = 16 * 1024**2
"""Of what the process may still take: for page tables, for what a moment takes between two looks, and for what threads
and the interpreter map between steps, since the holes that tensors leave in the heap are of no use to them."""
_LOOK_SECONDS = (0.1, 1.0)
"""The shortest and the longest time between two looks at what is free."""
_FASTEST_TAKING = 16 * 1024**3
"""Bytes a second that another process could take: nothing is missed where so much more is free."""


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """Largest values since `reset_peak`. None where the device does not tell it.

    allocated_bytes, reserved_bytes: PyTorch's allocator (CUDA). device_bytes: on CUDA what the whole card has in use
    now, as nvidia-smi shows it (reserved memory does not shrink by itself); on a CPU the peak of the resident set.
    """

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None

    def beside(self, program_bytes: int | None) -> "MemoryPeak":
        """On a CPU, what is resident beside the program, which stands for what PyTorch reserves on a card; None where
        it is too little to be seen: a program gives back more than a very small model takes.
        program_bytes: None on a card."""
        if program_bytes is None or self.device_bytes is None:
            return self
        beside_bytes = self.device_bytes - program_bytes
        return replace(self, reserved_bytes=beside_bytes if beside_bytes > 0 else None)


def choose_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM to the present resident set


def read_peak(device: torch.device) -> MemoryPeak:
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return MemoryPeak(
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
            total_bytes - free_bytes,
        )
    return MemoryPeak(device_bytes=_resident_peak_bytes())


def program_bytes(device: torch.device) -> int | None:
    """What the process holds now, on a CPU, where it shares the device with the tensors; None on a card."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else None


def trim_heap() -> None:
    """glibc keeps what was freed below the top of its heaps until it is asked; other C libraries lack the call."""
    if (
        sys.platform == "linux"
        and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None
    ):
        trim(0)


_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
_LARGE_BYTES = 1024**2


def map_large_blocks() -> None:
    """From now on glibc maps large blocks apart and gives each back when it is freed. By itself it learns to keep those
    of up to 32 MiB in its heap, which is faster, and leaves holes there into which the next ones do not fit."""
    if (
        sys.platform == "linux"
        and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None
    ):
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _resident_peak_bytes() -> int | None:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(device: torch.device) -> int:
    """What tensors hold now (CUDA), or the process without what its heap has free (CPU): what a peak is compared
    with."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return max(int(psutil.Process().memory_info().rss) - resident_free_in_heap(), 0)


def num_alloc_retries(device: torch.device) -> int:
    """How often PyTorch had to give cached blocks back to find memory. 0 on a CPU, which has no cache."""
    return (
        int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
        if device.type == "cuda"
        else 0
    )


def usable_bytes(device: torch.device) -> int | None:
    """What this process can still allocate. CUDA: what the card has free and what PyTorch holds without using it. CPU:
    what the machine has available, or what the process's own limits (RLIMIT_DATA, RLIMIT_AS) leave."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_left_by_limits()]) + free_in_heap()


class _MallocState(ctypes.Structure):
    """glibc's struct mallinfo2, see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *(
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
            ),
            "keepcost",
        )
    )


def free_in_heap() -> int:
    """What glibc holds without using it; 0 with other C libraries."""
    if (
        sys.platform != "linux"
        or (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None
    ):
        return 0
    mallinfo.restype = _MallocState
    return int(mallinfo().fordblks)


def resident_free_in_heap() -> int:
    """Of what glibc holds without using it, what the system has not had back."""
    if sys.platform != "linux":
        return 0
    return max(free_in_heap() - max(_untouched_bytes() - _least_untouched_bytes, 0), 0)


@contextmanager
def refusing(free_bytes: Callable[[], int | None]) -> Iterator[None]:
    """Within it the process is refused what is not there. Linux grants it, and kills when it is used; a refusal can be
    survived. free_bytes: what the machine or the control group has left, looked at again while this lasts, since
    others take from it too. Something of it, or of the limit that the process had, is left to what comes afterwards.
    Elsewhere than on Linux of no effect."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ended = threading.Event()

    def bound() -> float:
        """Returns how many seconds that holds for."""
        free = free_bytes()
        bounds = [] if free is None else [_most_data_bytes(free)]
        if before != resource.RLIM_INFINITY:
            bounds.append(max(before - _KEPT_FREE_BYTES, 0))
        if bounds and not ended.is_set():
            resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
        if free is None:
            return _LOOK_SECONDS[1]
        return min(max(free / _FASTEST_TAKING, _LOOK_SECONDS[0]), _LOOK_SECONDS[1])

    def look() -> None:
        seconds = _LOOK_SECONDS[0]
        while not ended.wait(seconds):
            seconds = bound()

    looking = threading.Thread(target=look, name="fitune-memory", daemon=True)
    looks = start_thread(looking)  # else what was seen at the beginning holds
    bound()
    try:
        yield
    finally:
        ended.set()
        if looks:
            looking.join()
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


_least_untouched_bytes = sys.maxsize


def _most_data_bytes(free_bytes: int) -> int:
    """Of VmData, with which as much is resident as is free. Of what is mapped some is never touched, as the stacks of
    threads are: the least that was seen. The rest is what the heap has given back, and will take again."""
    global _least_untouched_bytes
    mapped, resident = _status_bytes("VmData:", "RssAnon:")
    _least_untouched_bytes = min(_least_untouched_bytes, max(mapped - resident, 0))
    return resident + _least_untouched_bytes + max(free_bytes - _KEPT_FREE_BYTES, 0)


def _untouched_bytes() -> int:
    mapped, resident = _status_bytes("VmData:", "RssAnon:")
    return max(mapped - resident, 0)


def _left_by_limits() -> Iterator[int]:
    if sys.platform == "linux":
        import resource

        for limit, used in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
            soft, _ = resource.getrlimit(limit)
            if soft != resource.RLIM_INFINITY:
                yield max(soft - _status_bytes(used)[0], 0)


def _status_bytes(*names: str) -> list[int]:
    """Of proc(5)'s status file, as it is at one moment. 0 where a line is missing."""
    found = dict.fromkeys(names, 0)
    for line in _STATUS.read_text().splitlines():
        if (name := line.partition("\t")[0]) in found:
            found[name] = int(line.split()[1]) * 1024
    return list(found.values())
