"""The machine a run happens on: what `fitune env` shows and a run keeps as env.json. Nothing heavy is imported:
versions are read from the packages' metadata. No name of the user or of a directory is in it."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fitune import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "peft", "accelerate", "safetensors", "numpy")
OPTIONAL_PACKAGES = ("bitsandbytes", "gguf", "liger-kernel", "torchao")


def environment(cards: Sequence[Mapping[str, Any]], output: Path) -> dict[str, Any]:
    """The machine as JSON holds it: sizes in bytes, unknown is None. `cards`: as found by the caller. `output`: where
    runs are kept, for the free disk space."""
    return {
        "fitune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
        "cards": [dict(card) for card in cards],
        "cpu": {
            "name": _cpu_name(),
            "num_cores": psutil.cpu_count(logical=False),
            "num_usable": _num_usable_cpus(),
        },
        "host": host_memory(),
        "disk": {"free_bytes": _free_disk_bytes(output)},
        "allocator": c_allocator(),
    }


def host_memory(root: Path = Path("/")) -> dict[str, int | None]:
    """total_bytes, free_bytes (what can be had without swapping) and limit_bytes (of the control group, None without
    one); total and free respect the limit. `root`: where /proc and /sys are found."""
    memory = psutil.virtual_memory()
    limits = [(limit, used) for limit, used in _group_limits(root) if limit < memory.total]
    free = min([memory.available, *(max(0, limit - used) for limit, used in limits)])
    limit = min((limit for limit, _ in limits), default=None)
    return {"total_bytes": min(memory.total, limit or memory.total), "free_bytes": free, "limit_bytes": limit}


def c_allocator(maps: Path = Path("/proc/self/maps")) -> str | None:
    """'tcmalloc', 'jemalloc' or 'mimalloc' where one is loaded into this process, else the C library's: 'glibc' or
    'musl'. None where that cannot be seen (no Linux)."""
    try:
        libraries = maps.read_text()
    except OSError:
        return None
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in libraries:
            return name
    return "musl" if "ld-musl" in libraries else "glibc"


def find_tcmalloc() -> str | None:
    """The path of an installed tcmalloc, which LD_PRELOAD takes; None where the usual places have none."""
    places = [Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    found = (path for place in places for path in sorted(place.glob("libtcmalloc*.so*")))
    return next((str(path) for path in found), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or None


def _num_usable_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count()


def _free_disk_bytes(output: Path) -> int | None:
    """`output` need not exist yet: its nearest parent that does counts."""
    place = output.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _group_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used without reclaimable file cache) in bytes of this process's control group and of all above it."""
    limits = []
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's: then only the mount itself, which is the container's, exists.
        group = mount / path.strip("/")
        for place in {group, *(parent for parent in group.parents if parent.is_relative_to(mount)), mount}:
            try:
                size = int((place / limit).read_text())
                reclaimable = re.search(rf"^{cache} (\d+)$", (place / "memory.stat").read_text(), re.MULTILINE)
                limits.append((size, int((place / used).read_text()) - (int(reclaimable[1]) if reclaimable else 0)))
            except (OSError, ValueError):  # no such place, or 'max'
                continue
    return limits
