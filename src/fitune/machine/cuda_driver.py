"""Lists the cards through CUDA's driver library, for machines without NVML.

A container with only the driver capability `compute` has a card but no NVML. Nothing is started on
a card, so its free memory stays unknown.
"""

import ctypes
import sys
import uuid
from ctypes import byref
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class DriverCard:
    """A card as CUDA's driver describes it."""

    name: str
    #: as NVML writes it
    uuid: str
    total_bytes: int
    compute_capability: tuple[int, int]


def driver_cards() -> tuple[DriverCard, ...]:
    """Return the cards that CUDA_VISIBLE_DEVICES selects, in CUDA's order.

    Returns none if the driver is missing or fails.
    """
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
    """Raise OSError if one of the calls did not return 0 (success)."""
    if any(results):
        raise OSError(f"CUDA's driver answers {max(results)}")
