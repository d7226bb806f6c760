"""Measures the memory and speed of a safe step, and teaches the memory model what it showed."""

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


def allocatable_bytes(device: torch.device) -> int | None:
    """Return how many bytes the process can still allocate, or None if that is unknown.

    On a CPU the limit of the process's control group counts too.
    """
    found = [usable_bytes(device)]
    if device.type == "cpu" and (free_bytes := cpu_device().free_bytes) is not None:
        found.append(free_bytes + resident_free_in_heap())
    return min((each for each in found if each is not None), default=None)


def survivable(device: torch.device) -> AbstractContextManager[None]:
    """Turn running out of memory on a CPU into an error, which would otherwise end the process."""
    return refusing(lambda: cpu_device().free_bytes) if device.type == "cpu" else nullcontext()


def observed(
    memory: MemoryModel,
    action: Callable[[], SafeResult],
    *,
    device: torch.device,
    free_bytes: int | None,
    num_tokens: int | None = None,
) -> SafeResult:
    """Return the result of `action`, after teaching `memory` what its peak and its speed show.

    free_bytes: before the action.
    num_tokens: of the action; None if its speed is not to be learned.
    """
    reset_peak(device)
    held, retries, start = held_bytes(device), num_alloc_retries(device), time.perf_counter()
    with survivable(device):
        result = action()
    seconds = time.perf_counter() - start
    peak = read_peak(device)
    peak_bytes = peak.device_bytes if peak.allocated_bytes is None else peak.allocated_bytes
    failures = [each for each in result.failures if each.place not in LATE]
    # smaller ones fitted when they were done again
    failed = [each for each in failures if each.num_positions > result.most_positions]
    smallest = min(failed, key=lambda each: each.num_positions, default=None)
    if free_bytes is not None and smallest is not None and smallest.left_bytes is not None:
        # another process may have taken memory since the step began
        free_bytes = min(free_bytes, smallest.left_bytes)
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
    """Do a safe step of a training loop that is not fitune's, in pieces that should fit.

    split: splits the step into pieces of at most so many padded tokens.
    most_positions: padded tokens of the largest piece that is wanted.
    row_positions: padded tokens of the longest sample. Pieces up to this size are tried again in
        any case, since they cannot be split.

    `memory` learns from the step. Raises what `safe_step` raises.
    """
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
