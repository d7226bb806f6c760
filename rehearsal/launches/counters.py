"""The counters of the stand-in (`driver/counters.h`)."""

import ctypes

NAMES = (
    "kernels",
    "matrix_products",
    "library_calls",
    "triton_kernels",
    "memsets",
    "copies_to_card",
    "copies_to_host",
    "copies_on_card",
    "stream_synchronisations",
    "device_synchronisations",
    "event_synchronisations",
    "blocking_copies",
    "mallocs",
    "frees",
    "event_records",
    "event_queries",
    "memory_queries",
    "host_allocations",
    "stream_waits",
    "bytes_to_card",
    "bytes_to_host",
)
"""In the order of `enum Counted`."""
OPERATIONS = (
    "kernels",
    "matrix_products",
    "library_calls",
    "triton_kernels",
    "memsets",
    "copies_on_card",
)
"""What the card has to begin."""
SYNCHRONISATIONS = (
    "stream_synchronisations",
    "device_synchronisations",
    "event_synchronisations",
    "blocking_copies",
)
"""Where the host waits for it."""


def read_counters() -> dict[str, int]:
    values = (ctypes.c_size_t * len(NAMES))()
    ctypes.CDLL(None).rehearsal_counters(values)
    return dict(zip(NAMES, values, strict=True))


def per_step(before: dict[str, int], after: dict[str, int], num_steps: int) -> dict[str, float]:
    return {name: (after[name] - before[name]) / num_steps for name in NAMES}
