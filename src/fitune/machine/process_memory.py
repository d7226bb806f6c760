"""Measures the memory of the device that a run uses; nothing else distinguishes CUDA and CPU.

On a CPU the process is the device: `device` means its resident set, whose peak can be reset (on
Linux).
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
#: Bytes that stay free: for page tables, for allocations between two checks, and for what threads
#: and the interpreter map between steps, which cannot use the holes that tensors leave in the heap.
_SPARE_FREE_BYTES = 16 * 1024**2
#: the shortest and the longest time between two checks of the free memory
_CHECK_SECONDS = (0.1, 1.0)
#: How many bytes per second another process could allocate. With more free memory, the next check
#: may come later.
_FASTEST_ALLOCATION = 16 * 1024**3


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The largest values since `reset_peak`. None if the device does not report them."""

    #: of PyTorch's CUDA allocator
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    #: on CUDA, what the whole card has in use now, as nvidia-smi shows it (reserved memory does not
    #: shrink by itself); on a CPU, the peak of the resident set
    device_bytes: int | None = None

    def without_program(self, program_bytes: int | None) -> "MemoryPeak":
        """Return the peak without the program's own memory, on a CPU.

        There the resident memory above the program takes the place of what PyTorch reserves on a
        card. It is None if it is too small to be seen, because a program can give back more than a
        very small model takes.

        program_bytes: None on a card.
        """
        if program_bytes is None or self.device_bytes is None:
            return self
        above_bytes = self.device_bytes - program_bytes
        return replace(self, reserved_bytes=above_bytes if above_bytes > 0 else None)


def choose_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def unknown_accelerator() -> str | None:
    """Return a sentence about an accelerator of this machine that predictions do not know.

    PyTorch has AMD's cards under the name cuda.
    """
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    kind = "cpu" if found is None else found.type
    if kind == "cuda" and torch.version.hip is not None:
        return (
            "this machine's card is of AMD: a run uses it, but plan and prediction are of the "
            "host's memory, since what its kernels allocate is not known; give batch.micro"
        )
    if kind in ("cpu", "cuda"):
        return None
    return (
        f"this machine has an accelerator of the kind {kind}, which fitune does not train on: plan "
        "and run are of the CPU"
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
    """Return the process's resident memory on a CPU, where tensors are part of it; else None."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else None


def trim_heap() -> None:
    """Make glibc give back what was freed below the top of its heaps.

    Other C libraries do not have this call.
    """
    if (
        sys.platform == "linux"
        and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None
    ):
        trim(0)


#: of mallopt(3)
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1024**2


def map_large_blocks() -> None:
    """Make glibc map large blocks separately and give each back when it is freed, from now on.

    By default it adapts to put blocks of up to 32 MiB on its heap, which is faster, but leaves
    holes into which the next blocks do not fit.
    """
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
    """Return the bytes of allocated tensors (CUDA), or of the process without free heap (CPU).

    A peak is compared with this.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return max(int(psutil.Process().memory_info().rss) - resident_free_in_heap(), 0)


def num_alloc_retries(device: torch.device) -> int:
    """Return how often PyTorch had to give cached blocks back to find memory.

    It is 0 on a CPU, which has no cache.
    """
    return (
        int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
        if device.type == "cuda"
        else 0
    )


def usable_bytes(device: torch.device) -> int | None:
    """Return how many bytes this process can still allocate.

    On CUDA this is what the card has free, plus what PyTorch has reserved and does not use. On a
    CPU it is what the machine has available, within the process's own limits (RLIMIT_DATA,
    RLIMIT_AS).
    """
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
    """Return the bytes that glibc holds without using them; 0 with other C libraries."""
    if (
        sys.platform != "linux"
        or (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None
    ):
        return 0
    mallinfo.restype = _MallocState
    return int(mallinfo().fordblks)


def resident_free_in_heap() -> int:
    """Return the bytes that glibc holds without using them and that are resident."""
    if sys.platform != "linux":
        return 0
    return max(free_in_heap() - max(_untouched_bytes() - _least_untouched_bytes, 0), 0)


@contextmanager
def refusing(free_bytes: Callable[[], int | None]) -> Iterator[None]:
    """Make allocations fail, inside this context, that exceed the free memory.

    By default Linux grants an allocation and kills the process when it uses the memory; a failed
    allocation can be survived. It does nothing on other systems.

    free_bytes: returns what the machine or the control group has free. It is called again and
        again, because other processes allocate too. A part of it, or of the process's own limit, is
        left for what follows the context.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ended = threading.Event()

    def bound() -> float:
        """Set the limit, and return after how many seconds it must be checked again."""
        free = free_bytes()
        bounds = [] if free is None else [_most_data_bytes(free)]
        if before != resource.RLIM_INFINITY:
            bounds.append(max(before - _SPARE_FREE_BYTES, 0))
        if bounds and not ended.is_set():
            resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
        if free is None:
            return _CHECK_SECONDS[1]
        return min(max(free / _FASTEST_ALLOCATION, _CHECK_SECONDS[0]), _CHECK_SECONDS[1])

    def check() -> None:
        seconds = _CHECK_SECONDS[0]
        while not ended.wait(seconds):
            seconds = bound()

    checking = threading.Thread(target=check, name="fitune-memory", daemon=True)
    is_checking = start_thread(checking)  # without the thread, the first limit stays
    bound()
    try:
        yield
    finally:
        ended.set()
        if is_checking:
            checking.join()
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


_least_untouched_bytes = sys.maxsize


def _most_data_bytes(free_bytes: int) -> int:
    """Return the VmData at which as much more is resident as is free.

    Some mapped memory is never touched, such as thread stacks: the least untouched memory seen so
    far. The other untouched memory is what the heap has given back and will use again.
    """
    global _least_untouched_bytes
    mapped, resident = _status_bytes("VmData:", "RssAnon:")
    _least_untouched_bytes = min(_least_untouched_bytes, max(mapped - resident, 0))
    return resident + _least_untouched_bytes + max(free_bytes - _SPARE_FREE_BYTES, 0)


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
    """Read values from proc(5)'s status file at one moment; 0 if a line is missing."""
    found = dict.fromkeys(names, 0)
    for line in _STATUS.read_text().splitlines():
        if (name := line.partition("\t")[0]) in found:
            found[name] = int(line.split()[1]) * 1024
    return list(found.values())
