"""Predicts how much more memory than its tensors a CPU process uses.

The C library does not give all freed blocks back, and the first step loads code that was not needed
before:

    resident above the program = FIRST_STEP + allocated + min(share of allocated, most)

FIRST_STEP is what a model of 15 MiB was measured to need besides its tensors. Shares and bounds
come from the settings of benchmarks/cpu_accuracy.py, with 26 M to 135 M parameters;
docs/accuracy.md has the results. If every large block is mapped, or under tcmalloc, the process
follows its tensors. glibc by default puts blocks below 32 MiB on its heap, where freed blocks
between allocated ones are not given back. This takes more memory with LoRA and with gradient
checkpointing, and hardly more with larger models.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fitune.machine.environment import c_allocator
from fitune.units import MIB

Method = Literal["full", "lora"]
#: lowest, expected, highest
Three = tuple[float, float, float]

MAPPED = "glibc, large blocks mapped"
MAPPED_THRESHOLD_BYTES = 1024**2
#: Lowest, expected and highest: code of the kernels and of the matrix library (17 to 22 MiB), their
#: buffers, and Python objects.
FIRST_STEP_BYTES = (20 * MIB, 26 * MIB, 36 * MIB)


@dataclass(frozen=True, slots=True)
class AllocatorHabit:
    """How much freed memory a C allocator does not give back: lowest, expected and highest."""

    name: str
    #: as a fraction of the allocated bytes
    share: Three
    #: but at most so much
    most_mib: Three = (math.inf, math.inf, math.inf)

    def resident_bytes(self, live_bytes: int) -> tuple[int, int, int]:
        """Return how much larger the process is than before the model was loaded.

        live_bytes: what its tensors take. The result is the lowest, the expected and the highest
        value, in bytes.
        """
        low, expected, high = (
            first + live_bytes + int(min(share * live_bytes, most * MIB))
            for first, share, most in zip(FIRST_STEP_BYTES, self.share, self.most_mib, strict=True)
        )
        return low, expected, high


#: (share, most_mib) by method, and by whether layers use gradient checkpointing
_GLIBC: dict[tuple[Method, bool], tuple[Three, Three]] = {
    ("full", False): ((0.10, 0.21, 0.26), (120, 250, 500)),
    ("full", True): ((0.20, 0.60, 0.70), (0, 230, 330)),
    ("lora", False): ((0.35, 0.75, 0.90), (330, 455, 600)),
    ("lora", True): ((0.80, 1.50, 1.80), (600, 850, 1000)),
}
_SHARES: dict[str, Three] = {
    "tcmalloc": (0.00, 0.03, 0.08),
    MAPPED: (0.00, 0.00, 0.04),
    # measured once, on full fine-tuning of 26 M parameters with and without gradient checkpointing
    "jemalloc": (0.00, 0.02, 0.10),
    "mimalloc": (0.00, 0.02, 0.11),
}
_UNKNOWN = (0.00, 0.20, 1.80)


def allocator_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this process's C allocator.

    It is MAPPED for glibc with a fixed low threshold for mmap.
    """
    name = c_allocator() or "unknown"
    threshold = environment.get("MALLOC_MMAP_THRESHOLD_", "")
    is_mapped = (
        name == "glibc" and threshold.isdecimal() and int(threshold) <= MAPPED_THRESHOLD_BYTES
    )
    return MAPPED if is_mapped else name


def allocator_habit(
    method: Method, *, recomputes: bool, environment: Mapping[str, str] = os.environ
) -> AllocatorHabit:
    """Return the habit of this process's C allocator; an unmeasured one has a wide range."""
    name = allocator_name(environment)
    if name == "glibc":
        return AllocatorHabit(name, *_GLIBC[method, recomputes])
    return AllocatorHabit(name, _SHARES.get(name, _UNKNOWN))
