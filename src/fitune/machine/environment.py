"""Describes the machine that a run happens on, for `fitune env` and a run's env.json.

Nothing heavy is imported: versions are read from the packages' metadata. The description contains
no name of the user or of a directory.
"""

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pynvml

from fitune import __version__
from fitune.machine.cards import Device
from fitune.machine.devices import cpu_device, this_machine

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
)
OPTIONAL_PACKAGES = ("bitsandbytes", "gguf", "liger-kernel", "torchao")


def environment(output: Path) -> dict[str, Any]:
    """Describe the machine as JSON, with sizes in bytes and None for what is unknown.

    output: the directory of the runs, for the free disk space.

    Free memory is what all processes leave free now; a run measures it before it uses the card.
    """
    memory = cpu_device()
    return {
        "fitune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
        "driver": driver_version(),
        "cards": [_card(device) for device in this_machine()],
        "cpu": {
            "name": _cpu_name(),
            "num_cores": psutil.cpu_count(logical=False),
            "num_usable": _num_usable_cpus(),
        },
        "host": {
            "installed_bytes": memory.box_bytes,
            "total_bytes": memory.total_bytes,
            "free_bytes": memory.free_bytes,
        },
        "disk": {"free_bytes": _free_disk_bytes(output)},
        "allocator": c_allocator(),
    }


def c_allocator(maps: Path = Path("/proc/self/maps")) -> str | None:
    """Return 'tcmalloc', 'jemalloc' or 'mimalloc' if loaded, or else 'glibc' or 'musl'.

    Returns None if the process's libraries are unknown (not on Linux).
    """
    try:
        libraries = maps.read_text()
    except OSError:
        return None
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in libraries:
            return name
    return "musl" if "ld-musl" in libraries else "glibc"


def find_tcmalloc() -> str | None:
    """Return the path of an installed tcmalloc for LD_PRELOAD, or None if there is none."""
    places = [
        Path("/usr/lib"),
        Path("/usr/lib64"),
        Path("/usr/local/lib"),
        *Path("/usr/lib").glob("*-linux-gnu"),
    ]
    found = (path for place in places for path in sorted(place.glob("libtcmalloc*.so*")))
    return next((str(path) for path in found), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or None


def _num_usable_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count()


def _free_disk_bytes(output: Path) -> int | None:
    """Return the free bytes of the nearest parent of `output` that exists."""
    place = output.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _card(device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "box_bytes": device.box_bytes,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "used_bytes": device.used_bytes,
        "compute_capability": device.compute_capability
        and ".".join(map(str, device.compute_capability)),
    }


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
