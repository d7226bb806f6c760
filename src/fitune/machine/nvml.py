"""Reads NVIDIA's management library: the cards that this process may use, and their state now.

Every call is guarded. If a card, driver or platform does not support a query (MIG has no
utilisation, WSL and Windows have no memory per process), the value is None. So no query ends a run.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

#: No card has so much. WSL reports 2**64 bytes for unknown values (nvtop #432).
NOT_AVAILABLE_BYTES = 2**60

#: bits of nvmlDeviceGetCurrentClocksEventReasons that mean that the card could be faster
_SLOWED_BY = (
    ("nvmlClocksEventReasonSwPowerCap", "power limit"),
    ("nvmlClocksEventReasonSwThermalSlowdown", "heat"),
    ("nvmlClocksEventReasonHwThermalSlowdown", "heat"),
    ("nvmlClocksEventReasonHwPowerBrakeSlowdown", "power brake"),
)


@dataclass(frozen=True, slots=True)
class CardMemory:
    """The memory of a card."""

    #: as CUDA reports it, without what the driver reserves for itself
    total_bytes: int
    free_bytes: int
    #: by all processes
    used_bytes: int


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that uses a card."""

    pid: int
    #: None if the platform does not report it
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class CardState:
    """A card, or an instance of one (MIG), now; unknown values are None."""

    name: str | None = None
    uuid: str | None = None
    memory: CardMemory | None = None
    processes: tuple[CardProcess, ...] = ()
    utilisation_fraction: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    #: what slows the card down; '' for nothing
    throttled: str | None = None


@contextmanager
def nvml_session() -> Iterator[ModuleType | None]:
    """Open NVML, and yield None if the library or the driver is missing or does not respond."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # a broken installation may raise anything, and then no card can be queried
        yield None
        return
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def read_cards() -> tuple[CardState, ...]:
    """Read the cards that this process may use, in its order."""
    with nvml_session() as nvml:
        return (
            tuple(read_card(nvml, handle) for handle in visible_handles(nvml, os.environ))
            if nvml
            else ()
        )


@contextmanager
def card_reader(uuid: str, index: int) -> Iterator[Callable[[], CardState] | None]:
    """Yield a function that reads one card, or None if there is no such card.

    The card has this UUID (with or without GPU- or MIG- in front); if none has it, it is the
    visible card with this index.
    """
    with nvml_session() as nvml:
        handle = None
        if nvml is not None:
            handles = visible_handles(nvml, os.environ)
            same = [
                handle
                for handle in handles
                if (read_uuid(nvml, handle) or "").endswith(uuid.lower())
            ]
            handle = next(iter(same or handles[index : index + 1]), None)
        yield None if nvml is None or handle is None else lambda: read_card(nvml, handle)


def ask(nvml: ModuleType, function: str, *arguments: object) -> Any:
    """Return what a function of NVML returns, or None if card, driver or library lack it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def visible_handles(nvml: ModuleType, environment: Mapping[str, str]) -> list[object]:
    """Return the handles of the cards that CUDA_VISIBLE_DEVICES selects, in its order.

    The variable lists numbers or (prefixes of) UUIDs, and ends at the first invalid entry; if it
    names a card twice, no card is visible, as in CUDA. Numbers follow the bus order, as with
    CUDA_DEVICE_ORDER=PCI_BUS_ID. A card that is divided (MIG) stands for its first instance, the
    only one that CUDA uses unless one is named.
    """
    count = ask(nvml, "nvmlDeviceGetCount") or 0
    handles = [ask(nvml, "nvmlDeviceGetHandleByIndex", i) for i in range(count)]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [_first_instance(nvml, handle) for handle in handles if handle is not None]
    chosen: list[object] = []
    entries = [part.strip() for part in visible.split(",")]
    if len(set(entries)) < len(entries):
        return []
    for entry in entries:
        if entry.startswith("MIG-"):
            found = [ask(nvml, "nvmlDeviceGetHandleByUUID", entry)]
        elif entry.startswith("GPU-"):
            found = [
                h for h in handles if h is not None and (read_uuid(nvml, h) or "").startswith(entry)
            ]
        else:
            found = handles[int(entry) :][:1] if entry.isdecimal() else []
        if len(found) != 1 or found[0] is None:
            break
        chosen.append(_first_instance(nvml, found[0]))
    return chosen


def read_name(nvml: ModuleType, handle: object) -> str | None:
    return _text(ask(nvml, "nvmlDeviceGetName", handle))


def read_uuid(nvml: ModuleType, handle: object) -> str | None:
    return _text(ask(nvml, "nvmlDeviceGetUUID", handle))


def read_memory(nvml: ModuleType, handle: Any) -> CardMemory | None:
    version = getattr(nvml, "nvmlMemory_v2", None)
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle, version) or ask(
        nvml, "nvmlDeviceGetMemoryInfo", handle
    )
    if memory is None or max(memory.total, memory.free, memory.used) >= NOT_AVAILABLE_BYTES:
        return None
    # What the driver reserves for itself is in NVML's total (and not in `used`), but not in CUDA's.
    return CardMemory(memory.total - getattr(memory, "reserved", 0), memory.free, memory.used)


def read_card(nvml: ModuleType, handle: Any) -> CardState:
    whole = ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle
    utilisation = ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    milliwatts = ask(nvml, "nvmlDeviceGetPowerUsage", whole)
    celsius = ask(nvml, "nvmlDeviceGetTemperature", whole, 0)  # 0: NVML_TEMPERATURE_GPU
    return CardState(
        name=read_name(nvml, handle),
        uuid=read_uuid(nvml, handle),
        memory=read_memory(nvml, handle),
        processes=_processes(nvml, handle),
        utilisation_fraction=None if utilisation is None else utilisation.gpu / 100,
        power_watts=None if milliwatts is None else milliwatts / 1000,
        temperature_celsius=None if celsius is None else float(celsius),
        throttled=_throttled(nvml, whole),
    )


def _first_instance(nvml: ModuleType, handle: Any) -> object:
    mode = ask(nvml, "nvmlDeviceGetMigMode", handle)  # (now, after a restart); 1: divided
    if not mode or mode[0] != 1:
        return handle
    parts = range(ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    found = (ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in parts)
    return next((part for part in found if part is not None), handle)


def _processes(nvml: ModuleType, handle: Any) -> tuple[CardProcess, ...]:
    """Return the processes that compute or draw; NVML lists one that does both twice."""
    used: dict[int, int | None] = {}
    for kind in ("Compute", "Graphics"):
        for process in ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
            size = process.usedGpuMemory
            used[process.pid] = None if size is None or size >= NOT_AVAILABLE_BYTES else size
    return tuple(CardProcess(pid, size) for pid, size in used.items())


def _throttled(nvml: ModuleType, handle: object) -> str | None:
    bits = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if bits is None:
        # the function's name in drivers before 535
        bits = ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    if bits is None:
        return None
    return ", ".join(
        dict.fromkeys(reason for name, reason in _SLOWED_BY if bits & getattr(nvml, name))
    )


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
