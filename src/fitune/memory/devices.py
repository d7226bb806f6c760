"""The memory that a run can have: a catalogue of CUDA cards to plan for, and the cards and the memory of this machine.

Figures of the catalogue:
- memory on the box, bandwidth and compute capability: NVIDIA's data sheets and its CUDA GPU list. B200's bandwidth:
  7,680 bits at 3,996 MHz as its driver reports them (pytorch/ao #4002).
- by card, as NVIDIA names the document: GeForce RTX 50 "RTX Blackwell GPU Architecture", 40 "Ada GPU Architecture", 30
  "Ampere GA102 GPU Architecture", 20 and T4 "Turing GPU Architecture"; P100 "Tesla P100" (the PCIe board), V100 "Tesla
  V100 GPU Architecture" (the SXM2 board); the data sheets of RTX PRO 6000 Blackwell, RTX 6000 Ada, RTX A6000, RTX
  A5000, HGX B200 (an eighth of the board), H200, H100 (SXM, PCIe, NVL), A100 (the 80 GB SXM board; PCIe has 1,935
  GB/s), L40S, L40, L4, A40 and A10. H20 (148 TFLOP/s dense, 4.0 TB/s) and A10G (70, 600 GB/s) have no public one:
  resellers' and AWS's tables. Float32 rates agree with cores x 2 x boost clock (L4: 3 % below it, as printed), 16-bit
  rates with the ratio of the tensor cores to that.
- dense arithmetic, 16 bits in tensor cores with float32 accumulation (bfloat16 at the same rate from 8.0 on; outside
  tensor cores where there are none) and float32 outside them: NVIDIA's architecture white papers, at boost clock. Data
  sheets since Ampere print twice the tensor rate, with structured sparsity; what stands here is without it. GeForce
  accumulates in float32 at half the rate of the professional cards. Laptops are counted at the boost clock of 150 W:
  2,040 MHz for the RTX 4090's 9,728 cores, 2,160 MHz for the RTX 5090's 10,496.
- visible memory: `torch.cuda.mem_get_info`'s total as PyTorch's out-of-memory messages show it for such cards on Linux,
  for example 23.64 GiB of a 24 GB RTX 4090. It differs by 0.1 GiB between drivers, and is some 6 % less with ECC on.
- between card and host: PCI Express 3 (8 GT/s, 128b/130b: 0.985 GB/s a lane and direction) until Turing, 4 with Ampere
  and Ada, 5 since Hopper; 16 lanes, and 8 with the RTX 4060, 4060 Ti, 5060 and 5060 Ti, as NVIDIA's pages give them. A
  slot may have less.
- what the CUDA context takes outside PyTorch's allocator, an interval by compute capability from published
  measurements: T4 105 to 135 MiB (torch 2.11, lazy loading), Titan V 320 to 1,008 MiB (pytorch #28394), V100 1,343 MiB
  (2022), RTX 2080 Ti 1,035 and RTX 3090 1,644 MiB (before lazy loading, pytorch #49877), A100 863 MiB (2023), RTX A6000
  0.75 GB (CUDA 13), 0.20 GiB on 24 GB cards (vLLM #14447), H100 0.16 GiB (vLLM #12126), about 300 MiB in general since
  lazy loading (pytorch #107667). A measured value is always better.

The real machine overrides the catalogue: name and memory come from NVML, the rest from the row that fits.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import psutil

from fitune.errors import UsageError
from fitune.memory.cuda_driver import driver_cards
from fitune.memory.nvml import ask, nvml_session, read_memory, read_name, read_uuid, visible_handles
from fitune.units import GIB, MIB

GB = 1000**3
CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ContextPrior:
    """Bytes that the CUDA context holds before anything is measured: expected, and the interval seen so far."""

    low_bytes: int
    expected_bytes: int
    high_bytes: int


@dataclass(frozen=True)
class Device:
    """A card or the machine's memory. What is not known is None.

    pattern: regular expression of the names it goes by, lower case without blanks and NVIDIA's own words. box_bytes:
    memory as sold, in units of 2**30. total_bytes: what CUDA reports. Rates are peaks. free_bytes and used_bytes (by
    all processes) only of a real device, now.
    """

    name: str
    pattern: str
    box_bytes: int
    total_bytes: int
    compute_capability: tuple[int, int] | None = None
    bandwidth_bytes_per_second: float | None = None
    float16_flops_per_second: float | None = None
    float32_flops_per_second: float | None = None
    link_bytes_per_second: float | None = None
    multiprocessors: int | None = None
    context: ContextPrior | None = None
    kind: Literal["cuda", "cpu"] = "cuda"
    uuid: str | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None

    @property
    def bfloat16_flops_per_second(self) -> float | None:
        """The float16 rate, from compute capability 8.0 on; tensor cores before it have no bfloat16."""
        has_bfloat16 = self.compute_capability is not None and self.compute_capability >= (8, 0)
        return self.float16_flops_per_second if has_bfloat16 else None


_CONTEXTS = {  # MiB by lowest compute capability; the sources are in the module's docstring
    (6, 0): (300, 320, 1343),
    (7, 5): (105, 135, 1035),
    (8, 0): (205, 863, 1343),
    (8, 6): (205, 715, 1644),
    (8, 9): (205, 300, 900),
    (9, 0): (164, 300, 900),
    (10, 0): (150, 300, 900),
}


def context_prior(compute_capability: tuple[int, int]) -> ContextPrior:
    """The interval of the card's family; cards older than the table get its oldest row."""
    rows = [row for lowest, row in _CONTEXTS.items() if lowest <= compute_capability]
    low, expected, high = rows[-1] if rows else _CONTEXTS[6, 0]
    return ContextPrior(low * MIB, expected * MIB, high * MIB)


_LANES = {(6, 0): 0.985, (8, 0): 1.969, (9, 0): 3.938}  # GB/s by lowest compute capability, as in the docstring
_EIGHT_LANES = ("RTX 5060 Ti 16GB", "RTX 5060 Ti 8GB", "RTX 5060", "RTX 4060 Ti 16GB", "RTX 4060 Ti 8GB", "RTX 4060")


def _lane_bandwidth(compute_capability: tuple[int, int]) -> float:
    return GB * next(rate for lowest, rate in reversed(_LANES.items()) if lowest <= compute_capability)


def _card(
    name: str, pattern: str, memory: tuple[int, float], capability: tuple[int, int], rates: tuple[float, float, float]
) -> Device:
    """A row of the catalogue. memory: GB on the box, GiB visible. rates: GB/s, TFLOP/s in 16 bits, in float32."""
    box, visible = memory
    bandwidth, float16, float32 = rates
    return Device(
        name=name,
        pattern=pattern,
        box_bytes=box * GIB,
        total_bytes=int(visible * GIB),
        compute_capability=capability,
        bandwidth_bytes_per_second=bandwidth * GB,
        float16_flops_per_second=float16 * 1e12,
        float32_flops_per_second=float32 * 1e12,
        link_bytes_per_second=(8 if name in _EIGHT_LANES else 16) * _lane_bandwidth(capability),
        multiprocessors=_MULTIPROCESSORS[name],
        context=context_prior(capability),
    )


_MULTIPROCESSORS = {
    "RTX 5090": 170,
    "RTX 5080": 84,
    "RTX 5070 Ti": 70,
    "RTX 5070": 48,
    "RTX 5060 Ti 16GB": 36,
    "RTX 5060 Ti 8GB": 36,
    "RTX 5060": 30,
    "RTX 5090 Laptop": 82,
    "RTX PRO 6000 Blackwell": 188,
    "RTX 4090": 128,
    "RTX 4090 D": 114,
    "RTX 4090 Laptop": 76,
    "RTX 4080 SUPER": 80,
    "RTX 4080": 76,
    "RTX 4070 Ti SUPER": 66,
    "RTX 4070 Ti": 60,
    "RTX 4070 SUPER": 56,
    "RTX 4070": 46,
    "RTX 4060 Ti 16GB": 34,
    "RTX 4060 Ti 8GB": 34,
    "RTX 4060": 24,
    "RTX 6000 Ada": 142,
    "L40S": 142,
    "L40": 142,
    "L4": 58,
    "RTX 3090 Ti": 84,
    "RTX 3090": 82,
    "RTX 3080 Ti": 80,
    "RTX 3080 10GB": 68,
    "RTX 3080 12GB": 70,
    "RTX 3070": 46,
    "RTX 3060 Ti": 38,
    "RTX 3060 12GB": 28,
    "RTX A6000": 84,
    "RTX A5000": 64,
    "A40": 84,
    "A10": 72,
    "A10G": 80,
    "B200": 148,
    "H200": 132,
    "H100 NVL": 132,
    "H100": 132,
    "H100 PCIe": 114,
    "H20": 78,
    "A100 80GB": 108,
    "A100 40GB": 108,
    "RTX 2080 Ti": 68,
    "T4": 40,
    "V100 32GB": 80,
    "V100 16GB": 80,
    "P100 16GB": 56,
    "GTX 1080 Ti": 28,
}
"""From the same documents."""


CATALOGUE: tuple[Device, ...] = (
    # consumer
    _card("RTX 5090", "(rtx)?5090", (32, 31.36), (12, 0), (1792, 209.5, 104.8)),
    _card("RTX 5080", "(rtx)?5080", (16, 15.47), (12, 0), (960, 112.6, 56.3)),
    _card("RTX 5070 Ti", "(rtx)?5070ti", (16, 15.47), (12, 0), (896, 87.9, 43.9)),
    _card("RTX 5070", "(rtx)?5070", (12, 11.50), (12, 0), (672, 61.7, 30.9)),
    _card("RTX 5060 Ti 16GB", "(rtx)?5060ti", (16, 15.47), (12, 0), (448, 47.4, 23.7)),
    _card("RTX 5060 Ti 8GB", "(rtx)?5060ti", (8, 7.53), (12, 0), (448, 47.4, 23.7)),
    _card("RTX 5060", "(rtx)?5060", (8, 7.53), (12, 0), (448, 38.4, 19.2)),
    _card("RTX 5090 Laptop", "(rtx)?5090laptop", (24, 23.42), (12, 0), (896, 90.7, 45.3)),
    _card("RTX 4090", "(rtx)?4090", (24, 23.64), (8, 9), (1008, 165.2, 82.6)),
    _card("RTX 4090 D", "(rtx)?4090d", (24, 23.64), (8, 9), (1008, 147.1, 73.5)),
    _card("RTX 4090 Laptop", "(rtx)?4090laptop", (16, 15.70), (8, 9), (576, 79.4, 39.7)),
    _card("RTX 4080 SUPER", "(rtx)?4080super", (16, 15.70), (8, 9), (736, 104.4, 52.2)),
    _card("RTX 4080", "(rtx)?4080", (16, 15.70), (8, 9), (717, 97.5, 48.7)),
    _card("RTX 4070 Ti SUPER", "(rtx)?4070tisuper", (16, 15.70), (8, 9), (672, 88.2, 44.1)),
    _card("RTX 4070 Ti", "(rtx)?4070ti", (12, 11.73), (8, 9), (504, 80.2, 40.1)),
    _card("RTX 4070 SUPER", "(rtx)?4070super", (12, 11.73), (8, 9), (504, 70.9, 35.5)),
    _card("RTX 4070", "(rtx)?4070", (12, 11.73), (8, 9), (504, 58.3, 29.1)),
    _card("RTX 4060 Ti 16GB", "(rtx)?4060ti", (16, 15.70), (8, 9), (288, 44.1, 22.1)),
    _card("RTX 4060 Ti 8GB", "(rtx)?4060ti", (8, 7.75), (8, 9), (288, 44.1, 22.1)),
    _card("RTX 4060", "(rtx)?4060", (8, 7.75), (8, 9), (272, 30.2, 15.1)),
    _card("RTX 3090 Ti", "(rtx)?3090ti", (24, 23.68), (8, 6), (1008, 80.0, 40.0)),
    _card("RTX 3090", "(rtx)?3090", (24, 23.69), (8, 6), (936, 71.2, 35.6)),
    _card("RTX 3080 Ti", "(rtx)?3080ti", (12, 11.76), (8, 6), (912, 68.2, 34.1)),
    _card("RTX 3080 10GB", "(rtx)?3080", (10, 9.77), (8, 6), (760, 59.5, 29.8)),
    _card("RTX 3080 12GB", "(rtx)?3080", (12, 11.76), (8, 6), (912, 61.3, 30.6)),
    _card("RTX 3070", "(rtx)?3070", (8, 7.78), (8, 6), (448, 40.6, 20.3)),
    _card("RTX 3060 Ti", "(rtx)?3060ti", (8, 7.78), (8, 6), (448, 32.4, 16.2)),
    _card("RTX 3060 12GB", "(rtx)?3060", (12, 11.76), (8, 6), (360, 25.5, 12.7)),
    _card("RTX 2080 Ti", "(rtx)?2080ti", (11, 10.76), (7, 5), (616, 53.8, 13.4)),
    _card("GTX 1080 Ti", "(gtx)?1080ti", (11, 10.91), (6, 1), (484, 0.18, 11.3)),
    # workstation
    _card("RTX PRO 6000 Blackwell", "(rtx)?pro6000(blackwell)?", (96, 94.97), (12, 0), (1792, 503.8, 125.0)),
    _card("RTX 6000 Ada", "(rtx)?6000ada", (48, 47.50), (8, 9), (960, 364.2, 91.1)),
    _card("RTX A6000", "(rtx)?a6000", (48, 47.53), (8, 6), (768, 154.8, 38.7)),
    _card("RTX A5000", "(rtx)?a5000", (24, 23.67), (8, 6), (768, 111.1, 27.8)),
    # data centre
    _card("B200", "b200", (180, 178.35), (10, 0), (7672, 2250.0, 75.0)),
    _card("H200", "h200(sxm)?", (141, 139.80), (9, 0), (4800, 989.4, 66.9)),
    _card("H100 NVL", "h100nvl", (94, 93.10), (9, 0), (3938, 835.5, 60.0)),
    _card("H100", "h[18]00(sxm5?)?", (80, 79.18), (9, 0), (3352, 989.4, 66.9)),
    _card("H100 PCIe", "h100pcie", (80, 79.18), (9, 0), (2039, 756.0, 51.2)),
    _card("H20", "h20", (96, 95.00), (9, 0), (4000, 148.0, 44.0)),
    _card("A100 80GB", "a[18]00(sxm4?|pcie)?", (80, 79.25), (8, 0), (2039, 312.0, 19.5)),
    _card("A100 40GB", "a100(sxm4?|pcie)?", (40, 39.45), (8, 0), (1555, 312.0, 19.5)),
    _card("L40S", "l40s", (48, 44.40), (8, 9), (864, 362.1, 91.6)),
    _card("L40", "l40", (48, 44.40), (8, 9), (864, 181.0, 90.5)),
    _card("L4", "l4", (24, 22.05), (8, 9), (300, 121.0, 30.3)),
    _card("A40", "a40", (48, 44.40), (8, 6), (696, 149.7, 37.4)),
    _card("A10", "a10", (24, 22.05), (8, 6), (600, 125.0, 31.2)),
    _card("A10G", "a10g", (24, 22.05), (8, 6), (600, 70.0, 35.0)),
    _card("T4", "t4", (16, 14.75), (7, 5), (320, 65.0, 8.1)),
    _card("V100 32GB", "v100(sxm[23]|pcie)?", (32, 31.74), (7, 0), (900, 125.0, 15.7)),
    _card("V100 16GB", "v100(sxm2|pcie)?", (16, 15.77), (7, 0), (900, 125.0, 15.7)),
    _card("P100 16GB", "p100(sxm2|pcie)?", (16, 15.89), (6, 0), (732, 18.7, 9.3)),
)

_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|graphics|gpu|generation|(workstation|server) edition|max q|hbm\d*e?|gddr\d\w?"
)
_MEMORY = re.compile(r"(?<![\da-z])(\d{1,3}) ?g(i?b)?(?![a-z])")


def _name_and_memory(text: str) -> tuple[str, int | None]:
    """'NVIDIA A100-SXM4-80GB' -> ('a100sxm4', 80): the name as the patterns have it, and GB where it names them."""
    words = _NOISE.sub(" ", text.lower().replace("-", " ").replace("_", " "))
    memory = _MEMORY.search(words)
    return re.sub(r"[^a-z0-9]", "", _MEMORY.sub(" ", words)), int(memory[1]) if memory else None


def _rows(text: str) -> list[Device]:
    name, memory = _name_and_memory(text)
    rows = [row for row in CATALOGUE if re.fullmatch(row.pattern, name)]
    return [row for row in rows if memory in (None, row.box_bytes // GIB)]


def find_device(text: str) -> Device:
    """The card that a person means by 'RTX 4090', '4090', 'NVIDIA GeForce RTX 3060' or 'a100 80gb'; 'cpu' is this
    machine's own memory.

    Raises UsageError when it is unknown or could be several.
    """
    if text.strip().lower() == "cpu":
        return cpu_device()
    rows = _rows(text)
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise UsageError(f"'{text}' can be {' or '.join(row.name for row in rows)}: name one of them")
    wanted, _ = _name_and_memory(text)
    keys = {_name_and_memory(row.name)[0]: row.name for row in CATALOGUE}
    keys |= {key.removeprefix("rtx"): name for key, name in keys.items()}
    same = [row.name for row in CATALOGUE if re.fullmatch(row.pattern, wanted)]
    close = same or list(dict.fromkeys(keys[key] for key in get_close_matches(wanted, keys, n=3, cutoff=0.7)))
    known = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(row.name for row in CATALOGUE)}."
    raise UsageError(f"unknown card '{text}': {known} For any other card set memory.budget, like 20GiB")


def this_machine() -> tuple[Device, ...]:
    """The NVIDIA cards that this process may use, in its order, with their free memory now; without NVML as the driver
    names them, their free memory unknown. None without a driver or a card."""
    with nvml_session() as nvml:
        if nvml is not None:
            return tuple(_real_device(nvml, handle) for handle in visible_handles(nvml, os.environ))
    return tuple(
        replace(_named(card.name, card.total_bytes, card.compute_capability), uuid=card.uuid) for card in driver_cards()
    )


def cpu_device() -> Device:
    """This machine's memory, or what its control group leaves of it. Page cache counts as free: the kernel gives it up
    when memory is asked for."""
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
    """Limits and use (without page cache) in bytes of the process's control groups and those above them, versions 1 and
    2. Those that lie outside the mounted tree, as in a container, are not seen. Beyond memory.high nothing is killed,
    but all that allocates is slowed down to a crawl."""
    try:
        lines = process_cgroups.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, limit_names, used_name, prefix = root, ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit_names, used_name = root / "memory", ["memory.limit_in_bytes"], "memory.usage_in_bytes"
            prefix = "total_"  # with the groups below, as the use is
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
    """Pages of files in a control group's memory.stat; those of shared memory are not among them."""
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
        _named(name, memory.total_bytes if memory else 0, capability),
        uuid=read_uuid(nvml, handle),
        free_bytes=memory.free_bytes if memory else None,
        used_bytes=memory.used_bytes if memory else None,
    )


def _named(name: str, total_bytes: int, capability: tuple[int, int] | None) -> Device:
    """A card that is here, with what the catalogue tells of its like. total_bytes: 0 where that is unknown."""
    unknown = Device(name=name, pattern="", box_bytes=total_bytes, total_bytes=total_bytes)
    # Of namesakes with different memory, the nearest; a card may carry more than its namesake was ever sold with.
    row = min(_rows(name), key=lambda row: abs(row.total_bytes - total_bytes), default=unknown)
    capability = capability or row.compute_capability
    return replace(
        row,
        name=name,
        box_bytes=max(row.box_bytes, total_bytes),
        total_bytes=total_bytes or row.total_bytes,
        compute_capability=capability,
        context=context_prior(capability) if capability else None,
    )
