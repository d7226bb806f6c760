"""Random numbers in a step: each micro-batch draws from a seed of its own, and the program's streams stay in place.

So a micro-batch that is done again draws the same dropout masks, and neither a retry nor another split shifts what the
next step draws.
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
    """A function of these three alone, in 64 bits."""
    state = np.zeros(1, np.uint64)
    for word in (run_seed, step, first_row_id):
        state = mix(state + np.array([(word * _GOLDEN + _GOLDEN) & _MASK], np.uint64))
    return int(state[0])


def seed_streams(seed: int, device: torch.device) -> None:
    """The streams that a model's forward may draw from: torch's of the CPU and of `device`, Python's and NumPy's."""
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed asks every kind of device, which takes 0.3 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """All of these streams are afterwards where they were before, also after an error."""
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
