"""The cards as CUDA's driver library names them, for machines without NVML: a container that was given `compute` alone
has a card and no management library. Nothing is started on a card, so its free memory stays unknown."""

import ctypes
import sys
import uuid
from ctypes import byref
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class DriverCard:
    """uuid: as NVML writes it."""

    name: str
    uuid: str
    total_bytes: int
    compute_capability: tuple[int, int]


def driver_cards() -> tuple[DriverCard, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; none without the driver or where it fails."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
        count = ctypes.c_int()
        _check(driver.cuInit(0), driver.cuDeviceGetCount(byref(count)))
        return tuple(_card(driver, number) for number in range(count.value))
    except (OSError, AttributeError):
        return ()


def _card(driver: ctypes.CDLL, number: int) -> DriverCard:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, total, own = (
        ctypes.create_string_buffer(256),
        ctypes.c_size_t(),
        ctypes.create_string_buffer(16),
    )
    _check(
        driver.cuDeviceGet(byref(device), number),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceTotalMem_v2(byref(total), device),
        driver.cuDeviceGetUuid_v2(own, device),
        driver.cuDeviceGetAttribute(byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(byref(minor), _MINOR, device),
    )
    found = f"GPU-{uuid.UUID(bytes=own.raw)}"
    return DriverCard(
        name.value.decode(errors="replace"), found, total.value, (major.value, minor.value)
    )


def _check(*results: int) -> None:
    """Raises OSError where one of the calls was not a success (0)."""
    if any(results):
        raise OSError(f"CUDA's driver answers {max(results)}")
