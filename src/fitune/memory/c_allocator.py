"""How much more than the live tensors a CPU process holds: the C library keeps freed blocks, and the first step brings
in code that was not needed before.

    resident above the program = FIRST_STEP + factor x live bytes

FIRST_STEP is what a model of 15 MiB was measured to need besides its tensors; the factors are from the settings of
benchmarks/cpu_accuracy.py, 26 M to 135 M parameters, whose results are in docs/accuracy.md. With every large block
mapped, or under tcmalloc, the process follows its tensors. glibc as it comes puts blocks below 32 MiB on its heap and
keeps there what is freed between blocks that live on: most with LoRA, more with recomputation than without.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fitune.memory.environment import c_allocator
from fitune.units import MIB

Method = Literal["full", "lora"]
Factor = tuple[float, float, float]  # lowest, expected, highest

MAPPED = "glibc, large blocks mapped"
MAPPED_THRESHOLD_BYTES = 1024**2
FIRST_STEP_BYTES = (20 * MIB, 26 * MIB, 36 * MIB)
"""Pages of code of the kernels and of the matrix library (17 to 22 MiB), their buffers, and Python's objects: lowest,
expected, highest."""

_GLIBC: dict[tuple[Method, bool], Factor] = {  # by method, and whether layers are recomputed
    ("full", False): (1.10, 1.18, 1.26),
    ("full", True): (1.15, 1.30, 1.60),
    ("lora", False): (1.35, 1.58, 1.80),
    ("lora", True): (1.80, 2.40, 2.70),
}
_FACTORS: dict[str, Factor] = {
    "tcmalloc": (1.00, 1.03, 1.08),
    MAPPED: (1.00, 1.00, 1.04),
    # measured once, on full fine-tuning of 26 M parameters with and without recomputation
    "jemalloc": (1.00, 1.02, 1.10),
    "mimalloc": (1.00, 1.02, 1.11),
}
_UNKNOWN = (1.00, 1.20, 2.70)


@dataclass(frozen=True, slots=True)
class AllocatorFactor:
    """Resident over live bytes: lowest, expected, highest."""

    name: str
    low: float
    expected: float
    high: float

    def resident_bytes(self, live_bytes: int) -> tuple[int, int, int]:
        """What the process will hold above its state before the model was loaded: lowest, expected, highest."""
        factors = (self.low, self.expected, self.high)
        low, expected, high = (
            int(live_bytes * factor) + first for factor, first in zip(factors, FIRST_STEP_BYTES, strict=True)
        )
        return low, expected, high


def allocator_name(environment: Mapping[str, str] = os.environ) -> str:
    """Of this process: "glibc", "glibc, large blocks mapped" with a fixed low mmap threshold, "tcmalloc", ..."""
    name = c_allocator() or "unknown"
    threshold = environment.get("MALLOC_MMAP_THRESHOLD_", "")
    is_mapped = name == "glibc" and threshold.isdecimal() and int(threshold) <= MAPPED_THRESHOLD_BYTES
    return MAPPED if is_mapped else name


def allocator_factor(
    method: Method, *, recomputes: bool, environment: Mapping[str, str] = os.environ
) -> AllocatorFactor:
    """Of this process. One that was not measured gets a wide guess."""
    name = allocator_name(environment)
    if name == "glibc":
        return AllocatorFactor(name, *_GLIBC[method, recomputes])
    return AllocatorFactor(name, *_FACTORS.get(name, _UNKNOWN))
