"""Seeds the random numbers of each micro-batch, and restores the program's generators after a step.

A micro-batch that is computed again draws the same dropout masks, and neither a retry nor another
split changes what the next step draws.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fitune.data.order import mix

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def micro_batch_seed(run_seed: int, *, step: int, first_row_id: int) -> int:
    """Return a 64-bit seed that depends only on these three numbers."""
    state = np.zeros(1, np.uint64)
    for number in (run_seed, step, first_row_id):
        state = mix(state + np.array([(number * _GOLDEN + _GOLDEN) & _MASK], np.uint64))
    return int(state[0])


def seed_streams(seed: int, device: torch.device) -> None:
    """Seed all generators a forward may draw from: torch's (CPU, `device`), Python's, NumPy's."""
    # torch.manual_seed would query every kind of device, which takes 0.3 ms
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """Restore these generators afterwards, also after an error."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
