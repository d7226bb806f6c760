"""Cards without NVML: CUDA's driver library names them."""

import ctypes
import sys
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from fitune.machine.cuda_driver import DriverCard, driver_cards
from fitune.machine.devices import find_device, this_machine
from fitune.units import MIB

UUIDS = [uuid.uuid4(), uuid.uuid4()]
FAILED = 100  # CUDA_ERROR_NO_DEVICE


def driver(*, result: int = 0) -> SimpleNamespace:
    """Two RTX 4090, as the calls of CUDA's driver give them. result: of cuInit."""

    def put(pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0

    def put_text(buffer: Any, text: bytes) -> int:
        ctypes.memmove(buffer, text, len(text))
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: result,
        cuDeviceGetCount=lambda count: put(count, 2),
        cuDeviceGet=lambda device, number: put(device, number),
        cuDeviceGetName=lambda name, length, device: put_text(name, b"NVIDIA GeForce RTX 4090\0"),
        cuDeviceTotalMem_v2=lambda total, device: put(total, 24210 * MIB),
        cuDeviceGetUuid_v2=lambda own, device: put_text(own, UUIDS[device.value].bytes),
        cuDeviceGetAttribute=lambda value, attribute, device: put(value, {75: 8, 76: 9}[attribute]),
    )


def test_each_card_is_named_as_nvml_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver())
    assert driver_cards() == tuple(
        DriverCard("NVIDIA GeForce RTX 4090", f"GPU-{each}", 24210 * MIB, (8, 9)) for each in UUIDS
    )


@pytest.mark.parametrize(
    "library", [driver(result=FAILED), SimpleNamespace()], ids=["no device", "no CUDA"]
)
def test_a_driver_that_fails_has_no_card(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    assert driver_cards() == ()


def test_a_card_without_nvml_is_still_a_card_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver())
    card = this_machine()[1]
    assert (card.name, card.uuid, card.total_bytes) == (
        "NVIDIA GeForce RTX 4090",
        f"GPU-{UUIDS[1]}",
        24210 * MIB,
    )
    assert (card.free_bytes, card.compute_capability) == (None, (8, 9))
    assert card.bandwidth_bytes_per_second == find_device("4090").bandwidth_bytes_per_second
