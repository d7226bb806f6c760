import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fitune.errors import UsageError
from fitune.machine import devices
from fitune.machine.cards import CATALOGUE, Device, context_prior
from fitune.machine.devices import cpu_device, find_device, this_machine
from fitune.machine.process_memory import unknown_accelerator
from fitune.units import GIB, MIB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090d", "RTX 4090 D"),
        ("nvidia geforce rtx 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("3060 12GB", "RTX 3060 12GB"),
        ("RTX 3060", "RTX 3060 12GB"),
        ("RTX 4060 Ti 16G", "RTX 4060 Ti 16GB"),
        ("a100 80 GiB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H800", "H100"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA A10G", "A10G"),
    ],
)
def test_a_card_is_found_under_its_names(text: str, name: str) -> None:
    assert find_device(text).name == name


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_every_row_is_found_under_its_own_name(row: Device) -> None:
    assert find_device(row.name) == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A100", "can be A100 80GB or A100 40GB"),
        ("4060 Ti", "can be RTX 4060 Ti 16GB or RTX 4060 Ti 8GB"),
        ("4099", "did you mean RTX 4090"),
        ("4090 48GB", "did you mean RTX 4090?"),
        ("abacus", "known: RTX 5090, RTX 5080"),
        ("", "known: RTX 5090"),
    ],
)
def test_a_name_that_is_unknown_or_could_be_several_is_refused_with_a_suggestion(
    text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        find_device(text)


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_a_card_shows_a_little_less_memory_than_is_on_its_box(row: Device) -> None:
    assert 0.90 * row.box_bytes < row.total_bytes < row.box_bytes


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_a_context_prior_is_an_interval(row: Device) -> None:
    assert row.context is not None
    assert (
        100 * MIB
        < row.context.low_bytes
        <= row.context.expected_bytes
        < row.context.high_bytes
        < 2 * GIB
    )


@pytest.mark.parametrize(
    "row",
    [row for row in CATALOGUE if row.name.startswith(("RTX 3", "RTX 4", "RTX 5"))],
    ids=lambda row: row.name,
)
def test_tensor_cores_of_a_geforce_are_dense_and_accumulate_in_float32(row: Device) -> None:
    assert row.float16_flops_per_second is not None
    assert row.float32_flops_per_second is not None
    assert row.float16_flops_per_second / row.float32_flops_per_second == pytest.approx(
        2, rel=0.01
    )  # sparse: 4


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("A100 80GB", 312),
        ("H100", 989.4),
        ("H100 PCIe", 756),
        ("H200", 989.4),
        ("L40S", 362.1),
        ("B200", 2250),
    ],
)
def test_data_centre_cards_are_not_counted_with_sparsity(name: str, teraflops: float) -> None:
    assert find_device(name).bfloat16_flops_per_second == pytest.approx(teraflops * 1e12)


def test_bfloat16_begins_with_compute_capability_8() -> None:
    assert find_device("T4").bfloat16_flops_per_second is None
    assert find_device("3090").bfloat16_flops_per_second == 71.2e12


def test_the_context_prior_goes_by_family() -> None:
    assert context_prior((7, 5)).low_bytes == 105 * MIB
    assert context_prior((8, 6)).high_bytes == 1644 * MIB
    assert context_prior((12, 1)) == context_prior((10, 0))
    assert context_prior((5, 2)) == context_prior((6, 0))


class FakeNvml:
    """A machine with a 4090, an unknown card and a 4060 Ti; what a card does not support raises."""

    nvmlMemory_v2 = 2
    NVMLError = RuntimeError

    def __init__(self, *, has_v2: bool = True) -> None:
        self.has_v2 = has_v2
        self.is_open = False
        self.cards: list[tuple[Any, str, int, int, tuple[int, int]]] = [
            (b"NVIDIA GeForce RTX 4090", "GPU-aaaa1", 24564, 357, (8, 9)),
            ("NVIDIA Abacus 9000", "GPU-bbbb2", 65536, 100, (13, 0)),
            ("NVIDIA GeForce RTX 4060 Ti", "GPU-bbbb3", 16380, 300, (8, 9)),
        ]

    def nvmlInit(self) -> None:  # noqa: N802
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        raise RuntimeError(f"no {uuid}")

    def nvmlDeviceGetName(self, handle: int) -> Any:  # noqa: N802
        return self.cards[handle][0]

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return self.cards[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:  # noqa: N802
        total, reserved = (number * MIB for number in self.cards[handle][2:4])
        if version == 2 and not self.has_v2:
            raise RuntimeError("not supported")
        if version == 1:
            return SimpleNamespace(total=total, free=total - 1000 * MIB, used=1000 * MIB)
        return SimpleNamespace(
            total=total, reserved=reserved, free=total - reserved - 700 * MIB, used=700 * MIB
        )

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:  # noqa: N802
        return list(self.cards[handle][4])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_the_real_card_overrides_the_memory_of_the_catalogue(nvml: FakeNvml) -> None:
    card = this_machine()[0]
    assert (card.name, card.uuid) == ("NVIDIA GeForce RTX 4090", "GPU-aaaa1")
    assert (card.total_bytes, card.used_bytes) == ((24564 - 357) * MIB, 700 * MIB)
    assert card.free_bytes == (24564 - 357 - 700) * MIB
    assert card.bandwidth_bytes_per_second == find_device("4090").bandwidth_bytes_per_second
    assert not nvml.is_open


def test_namesakes_are_told_apart_by_their_memory(nvml: FakeNvml) -> None:
    assert this_machine()[2].box_bytes == 16 * GIB


def test_a_card_with_more_memory_than_was_ever_sold_keeps_its_rates(nvml: FakeNvml) -> None:
    nvml.cards[0] = ("NVIDIA GeForce RTX 4090", "GPU-aaaa1", 49140, 500, (8, 9))
    card = this_machine()[0]
    assert (card.total_bytes, card.box_bytes) == (48640 * MIB, 48640 * MIB)
    assert card.float32_flops_per_second == 82.6e12


def test_a_card_that_the_catalogue_does_not_know_has_memory_but_no_rates(nvml: FakeNvml) -> None:
    card = this_machine()[1]
    assert (card.name, card.total_bytes, card.compute_capability) == (
        "NVIDIA Abacus 9000",
        65436 * MIB,
        (13, 0),
    )
    assert card.bandwidth_bytes_per_second is None
    assert card.context == context_prior((13, 0))


def test_an_old_driver_without_the_second_memory_call_still_gives_memory(nvml: FakeNvml) -> None:
    nvml.has_v2 = False
    assert (this_machine()[0].total_bytes, this_machine()[0].used_bytes) == (
        24564 * MIB,
        1000 * MIB,
    )


def test_a_card_that_answers_nothing_raises_nothing(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in [
        name for name in dir(FakeNvml) if name.startswith("nvmlDeviceGet") and "Count" not in name
    ]:
        if call != "nvmlDeviceGetHandleByIndex":
            monkeypatch.delattr(FakeNvml, call)
    card = this_machine()[0]
    assert (card.free_bytes, card.uuid, card.compute_capability) == (None, None, None)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("2,0", ["GPU-bbbb3", "GPU-aaaa1"]),
        ("", []),
        ("-1", []),
        ("0,7,2", ["GPU-aaaa1"]),
        ("0,2,0", []),
        ("GPU-bbbb3,GPU-aa", ["GPU-bbbb3", "GPU-aaaa1"]),
        ("GPU-bbbb", []),
        ("MIG-1", []),
    ],
)
def test_only_the_visible_cards_count_in_their_order(
    visible: str, uuids: list[str], nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.uuid for card in this_machine()] == uuids


@pytest.mark.parametrize("module", [None, SimpleNamespace()])
def test_a_machine_without_the_library_or_the_driver_has_no_card(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert this_machine() == ()


def test_the_cpu_is_a_device_with_the_machines_memory() -> None:
    device = find_device("CPU")
    assert device.kind == "cpu"
    assert 0 < device.total_bytes <= psutil.virtual_memory().total
    assert device.free_bytes is not None
    assert device.used_bytes == device.total_bytes - device.free_bytes


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used"),
    [
        ("0::/outer/inner", "outer", "memory.max", "memory.current"),
        ("0::/outer/inner", "outer", "memory.high", "memory.current"),
        ("4:cpu,memory:/outer", "memory/outer", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_a_control_group_limits_the_cpus_memory(
    line: str, folder: str, limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(f"{line}\n7:pids:/\n")
    (tmp_path / folder / "inner").mkdir(parents=True)
    (tmp_path / folder / "inner" / limit).write_text("max\n")
    (tmp_path / folder / limit).write_text(f"{512 * MIB}\n")
    (tmp_path / folder / used).write_text(f"{500 * MIB}\n")
    monkeypatch.setattr(devices, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(devices, "PROCESS_CGROUPS", tmp_path / "cgroup")
    device = cpu_device()
    assert (device.total_bytes, device.free_bytes) == (512 * MIB, 12 * MIB)


@pytest.mark.parametrize(("line", "prefix"), [("0::/", ""), ("4:memory:/", "total_")])
def test_page_cache_of_a_control_group_is_free(
    line: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    for folder, limit, used in (
        (tmp_path, "memory.max", "memory.current"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        (folder / limit).write_text(f"{512 * MIB}\n")
        (folder / used).write_text(f"{500 * MIB}\n")
        statistics = f"active_file {100 * MIB}\ninactive_file {200 * MIB}\nfile {400 * MIB}\n"
        (folder / "memory.stat").write_text(
            "".join(f"{prefix}{row}\n" for row in statistics.splitlines())
        )
    (tmp_path / "cgroup").write_text(f"{line}\n")
    monkeypatch.setattr(devices, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(devices, "PROCESS_CGROUPS", tmp_path / "cgroup")
    assert cpu_device().free_bytes == 312 * MIB


@pytest.mark.parametrize("tightest", ["", "outer", "outer/inner"])
def test_of_nested_control_groups_the_one_that_has_least_left_counts(
    tightest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands: what its other groups use is used from it too."""
    for folder in ("", "outer", "outer/inner"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{512 * MIB}\n")
        (tmp_path / folder / "memory.current").write_text(
            f"{(500 if folder == tightest else 100) * MIB}\n"
        )
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    monkeypatch.setattr(devices, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(devices, "PROCESS_CGROUPS", tmp_path / "cgroup")
    assert cpu_device().free_bytes == 12 * MIB


def test_a_system_without_control_groups_has_no_such_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "PROCESS_CGROUPS", tmp_path / "nothing")
    assert cpu_device().total_bytes == psutil.virtual_memory().total


_TENSOR_RATIOS = {(7, 5): {4, 8}, (8, 6): {2, 4}, (8, 9): {2, 4}, (12, 0): {2, 4}}
"""16-bit over float32 rates of cards with display outputs, by compute capability: half rate on GeForce."""


@pytest.mark.parametrize(
    "row",
    [row for row in CATALOGUE if row.compute_capability in _TENSOR_RATIOS],
    ids=lambda row: row.name,
)
def test_the_tensor_rate_is_that_of_the_cores_of_its_kind(row: Device) -> None:
    assert row.float16_flops_per_second is not None
    assert row.float32_flops_per_second is not None
    assert row.compute_capability is not None
    ratio = row.float16_flops_per_second / row.float32_flops_per_second
    assert any(
        ratio == pytest.approx(each, rel=0.015) for each in _TENSOR_RATIOS[row.compute_capability]
    )


@pytest.mark.parametrize(
    ("kind", "hip", "sentence"),
    [
        ("mps", None, "of the kind mps, which fitune does not train on"),
        ("npu", None, "of the kind npu, which fitune does not train on"),
        (
            "cuda",
            "6.4",
            "is of AMD: a run uses it, but plan and prediction are of the host's memory",
        ),
        ("cuda", None, None),
        (None, None, None),
    ],
)
def test_an_accelerator_that_predictions_do_not_know_is_named(
    kind: str | None, hip: str | None, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if kind is None else SimpleNamespace(type=kind)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: found is not None)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: found)
    monkeypatch.setattr("torch.version.hip", hip)
    note = unknown_accelerator()
    assert note == sentence if sentence is None else sentence in str(note)
