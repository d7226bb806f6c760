"""How much more than the live tensors a CPU process holds: the C library keeps freed blocks, and the first step brings
in code that was not needed before.

    resident above the program = FIRST_STEP + live + min(share of live, most)

FIRST_STEP is what a model of 15 MiB was measured to need besides its tensors; shares and bounds are from the settings
of benchmarks/cpu_accuracy.py, 26 M to 135 M parameters, whose results are in docs/accuracy.md. With every large block
mapped, or under tcmalloc, the process follows its tensors. glibc as it comes puts blocks below 32 MiB on its heap and
keeps there what is freed between blocks that live on: more with LoRA and with recomputation, hardly more with larger
models.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fitune.machine.environment import c_allocator
from fitune.units import MIB

Method = Literal["full", "lora"]
Three = tuple[float, float, float]  # lowest, expected, highest

MAPPED = "glibc, large blocks mapped"
MAPPED_THRESHOLD_BYTES = 1024**2
FIRST_STEP_BYTES = (20 * MIB, 26 * MIB, 36 * MIB)
"""Pages of code of the kernels and of the matrix library (17 to 22 MiB), their buffers, and Python's objects: lowest,
expected, highest."""


@dataclass(frozen=True, slots=True)
class AllocatorHabit:
    """What is kept of freed blocks: a share of the live bytes, but not more than `most_mib`; each the lowest, expected
    and highest."""

    name: str
    share: Three
    most_mib: Three = (math.inf, math.inf, math.inf)

    def resident_bytes(self, live_bytes: int) -> tuple[int, int, int]:
        """What the process will hold above its state before the model was loaded: lowest, expected, highest."""
        low, expected, high = (
            first + live_bytes + int(min(share * live_bytes, most * MIB))
            for first, share, most in zip(FIRST_STEP_BYTES, self.share, self.most_mib, strict=True)
        )
        return low, expected, high


_GLIBC: dict[
    tuple[Method, bool], tuple[Three, Three]
] = {  # by method, and whether layers are recomputed
    ("full", False): ((0.10, 0.21, 0.26), (120, 250, 500)),
    ("full", True): ((0.20, 0.60, 0.70), (0, 230, 330)),
    ("lora", False): ((0.35, 0.75, 0.90), (330, 455, 600)),
    ("lora", True): ((0.80, 1.50, 1.80), (600, 850, 1000)),
}
_SHARES: dict[str, Three] = {
    "tcmalloc": (0.00, 0.03, 0.08),
    MAPPED: (0.00, 0.00, 0.04),
    # measured once, on full fine-tuning of 26 M parameters with and without recomputation
    "jemalloc": (0.00, 0.02, 0.10),
    "mimalloc": (0.00, 0.02, 0.11),
}
_UNKNOWN = (0.00, 0.20, 1.80)


def allocator_name(environment: Mapping[str, str] = os.environ) -> str:
    """Of this process: "glibc", "glibc, large blocks mapped" with a fixed low mmap threshold, "tcmalloc", ..."""
    name = c_allocator() or "unknown"
    threshold = environment.get("MALLOC_MMAP_THRESHOLD_", "")
    is_mapped = (
        name == "glibc" and threshold.isdecimal() and int(threshold) <= MAPPED_THRESHOLD_BYTES
    )
    return MAPPED if is_mapped else name


def allocator_habit(
    method: Method, *, recomputes: bool, environment: Mapping[str, str] = os.environ
) -> AllocatorHabit:
    """Of this process. One that was not measured gets a wide guess."""
    name = allocator_name(environment)
    if name == "glibc":
        return AllocatorHabit(name, *_GLIBC[method, recomputes])
    return AllocatorHabit(name, _SHARES.get(name, _UNKNOWN))
