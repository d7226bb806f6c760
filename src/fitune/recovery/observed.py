"""A safe step while it is watched: what was free before it, what it needed, and what that teaches the memory model."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from fitune.machine.devices import cpu_device
from fitune.machine.process_memory import (
    held_bytes,
    num_alloc_retries,
    read_peak,
    refusing,
    reset_peak,
    resident_free_in_heap,
    usable_bytes,
)
from fitune.recovery.failure import LATE
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel, Observation, choose_size, learn, raise_plan
from fitune.recovery.step import SafeResult, safe_step
from fitune.step.progress import P


def room_bytes(device: torch.device) -> int | None:
    """What the process can still allocate; on a CPU within its control group too. None where nothing tells it."""
    found = [usable_bytes(device)]
    if device.type == "cpu" and (free_bytes := cpu_device().free_bytes) is not None:
        found.append(free_bytes + resident_free_in_heap())
    return min((each for each in found if each is not None), default=None)


def survivable(device: torch.device) -> AbstractContextManager[None]:
    """Within it running out of memory is an error, which can be survived, and not the end of the process."""
    return refusing(lambda: cpu_device().free_bytes) if device.type == "cpu" else nullcontext()


def observed(
    memory: MemoryModel,
    action: Callable[[], SafeResult],
    *,
    device: torch.device,
    free_bytes: int | None,
    num_tokens: int | None = None,
) -> SafeResult:
    """What `action` returns, learned by `memory`. free_bytes: before it. num_tokens: None: its speed is not."""
    reset_peak(device)
    held, retries, start = held_bytes(device), num_alloc_retries(device), time.perf_counter()
    with survivable(device):
        result = action()
    seconds = time.perf_counter() - start
    peak = read_peak(device)
    peak_bytes = peak.device_bytes if peak.allocated_bytes is None else peak.allocated_bytes
    failures = [each for each in result.failures if each.place not in LATE]
    failed = [
        each for each in failures if each.num_positions > result.most_positions
    ]  # others fitted when done again
    smallest = min(failed, key=lambda each: each.num_positions, default=None)
    if free_bytes is not None and smallest is not None and smallest.left_bytes is not None:
        free_bytes = min(
            free_bytes, smallest.left_bytes
        )  # another process may have taken from it since the step began
    learn(
        memory,
        Observation(
            size=result.most_positions,
            need_bytes=None if result.failures or peak_bytes is None else max(peak_bytes - held, 0),
            tokens_per_second=None if num_tokens is None else num_tokens / seconds,
            failed_size=None if smallest is None else smallest.num_positions,
            free_bytes=free_bytes,
            num_alloc_retries=num_alloc_retries(device) - retries,
        ),
    )
    return result


def fitted_step(
    memory: MemoryModel,
    protection: Protection[P],
    split: Callable[[int], list[P]],
    *,
    step: int,
    most_positions: int,
    row_positions: int,
) -> SafeResult:
    """A safe step of a loop that is not fitune's, in pieces of a size that should fit, from which `memory` learns.

    split(most_positions): its pieces. most_positions: of the largest that is wanted. row_positions: of the longest row,
    which alone is tried again in any case: there is nothing else to try. Raises what `safe_step` raises."""
    raise_plan(memory, most_positions)
    free_bytes = protection.free_bytes()
    pieces = split(choose_size(memory, free_bytes))

    def fits(num_positions: int) -> bool:
        return num_positions <= row_positions or memory.fits(num_positions, protection.free_bytes())

    return observed(
        memory,
        lambda: safe_step(protection, pieces, step=step, fits=fits),
        device=protection.device,
        free_bytes=free_bytes,
    )
