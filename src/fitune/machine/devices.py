"""Describes the devices of this machine: its NVIDIA cards, and its own memory.

Name and memory of a card come from NVML, and everything else from the catalogue.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from fitune.machine.cards import Device, find_card, named_card
from fitune.machine.cuda_driver import driver_cards
from fitune.machine.nvml import (
    ask,
    nvml_session,
    read_memory,
    read_name,
    read_uuid,
    visible_handles,
)

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")


def find_device(text: str) -> Device:
    """Find a card of the catalogue by its name with `find_card`; 'cpu' is this machine's memory."""
    return cpu_device() if text.strip().lower() == "cpu" else find_card(text)


def this_machine() -> tuple[Device, ...]:
    """Return the NVIDIA cards that this process may use, in its order, with their free memory now.

    Without NVML the driver lists them, and their free memory is unknown. The result is empty
    without a driver or a card.
    """
    with nvml_session() as nvml:
        if nvml is not None:
            return tuple(_real_device(nvml, handle) for handle in visible_handles(nvml, os.environ))
    return tuple(
        replace(named_card(card.name, card.total_bytes, card.compute_capability), uuid=card.uuid)
        for card in driver_cards()
    )


def cpu_device() -> Device:
    """Describe this machine's memory, within the limits of the process's control groups.

    Page cache counts as free, because the kernel gives it up when memory is allocated.
    """
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits(CGROUP_ROOT, PROCESS_CGROUPS):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Device(
        name="CPU",
        pattern="cpu",
        box_bytes=memory.total,
        total_bytes=total,
        kind="cpu",
        free_bytes=free,
        used_bytes=total - free,
    )


def _cgroup_limits(root: Path, process_cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use (without page cache) of the process's control groups and their parents.

    Both are in bytes, for versions 1 and 2. Groups outside the mounted tree are not seen, as in a
    container. Above memory.high nothing is killed, but every allocation is slowed down extremely.
    """
    try:
        lines = process_cgroups.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, limit_names, used_name, prefix = (
                root,
                ["memory.max", "memory.high"],
                "memory.current",
                "",
            )
        elif "memory" in controllers.split(","):
            top, limit_names, used_name = (
                root / "memory",
                ["memory.limit_in_bytes"],
                "memory.usage_in_bytes",
            )
            prefix = "total_"  # includes the child groups, as the use does
        else:
            continue
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            for limit_name in limit_names:
                with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
                    limit = int((group / limit_name).read_text())
                    cache = _page_cache_bytes(group / "memory.stat", prefix)
                    yield limit, max(int((group / used_name).read_text()) - cache, 0)
            if group == top:
                break


def _page_cache_bytes(statistics: Path, prefix: str) -> int:
    """Return the bytes of files' pages in a control group's memory.stat, without shared memory."""
    try:
        numbers = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(numbers.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))


def _real_device(nvml: ModuleType, handle: Any) -> Device:
    name = read_name(nvml, handle) or "NVIDIA card"
    memory = read_memory(nvml, handle)
    answer = ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    capability = (int(answer[0]), int(answer[1])) if answer else None
    return replace(
        named_card(name, memory.total_bytes if memory else 0, capability),
        uuid=read_uuid(nvml, handle),
        free_bytes=memory.free_bytes if memory else None,
        used_bytes=memory.used_bytes if memory else None,
    )
