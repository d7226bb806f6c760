"""Predicts the memory of a run's second step, so that the run can compare it with the measurement.

The first two steps are predicted from the samples that they will see. On CUDA, the counters of
PyTorch's allocator are compared. On a CPU, it is the resident peak above what was resident before
the model was loaded, which includes the C library's own behaviour. The difference is stored for
later predictions (planning/past_errors.py).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from fitune.allocator.prediction import CPU_NOISE_BYTES, CPU_TOLERANCE, CUDA_TOLERANCE, Prediction
from fitune.config import RunConfig
from fitune.data.batches import batches
from fitune.data.examples import Examples
from fitune.data.rows import Batch
from fitune.data.split_by_rank import split_by_rank
from fitune.machine.cards import Device
from fitune.machine.devices import cpu_device, this_machine
from fitune.machine.nvml import read_cards
from fitune.machine.out_of_memory import release_workspaces
from fitune.machine.process_memory import MemoryPeak, program_bytes, trim_heap
from fitune.optimizers.table import OPTIMIZERS
from fitune.planning.choices import with_routing
from fitune.planning.past_errors import Circumstances, Residual, add_residual, circumstances
from fitune.planning.predict import predict_run
from fitune.planning.several_cards import shards_of, with_bucket
from fitune.trace.own_step import Pass
from fitune.units import format_bytes

CHECKED_STEP = 2
#: Micro-batches of a step that are recorded, the largest ones. Each may have its own size, and what
#: the allocator reserves depends on all of them, but the run waits for the recording: 0.15 s for
#: each with minimind2-small, 0.3 s with 8B and LoRA, on one core.
MOST_MICRO_BATCHES = 16


@dataclass(frozen=True)
class SelfCheck:
    """The prediction of the second optimizer step."""

    predicted: Prediction
    #: on a CPU: resident before the model was loaded
    program_bytes: int | None
    #: under which the outcome is stored; None if it is not stored
    circumstances: Circumstances | None = None
    #: whether less may be measured. The prediction for a sharded model counts tensors together that
    #: are not allocated at the same time.
    is_bound: bool = False

    def measured(self, peak: MemoryPeak) -> MemoryPeak:
        """Convert a measured peak to what is predicted: on a CPU, subtract the program itself."""
        return peak.without_program(self.program_bytes)

    def compare(self, measured: MemoryPeak) -> tuple[str, bool]:
        """Return a message with prediction and measurement, and whether they agree.

        measured: as `measured` returns it.
        """
        sides = {
            "allocated": (self.predicted.peak_allocated_bytes, measured.allocated_bytes),
            "reserved" if self.program_bytes is None else "resident": (
                self.predicted.peak_reserved_bytes,
                measured.reserved_bytes,
            ),
        }
        parts, agrees = [], True
        tolerance = CUDA_TOLERANCE if self.program_bytes is None else CPU_TOLERANCE
        for name, (predicted, found) in sides.items():
            if found is None:
                if name == "resident":
                    agrees &= predicted <= CPU_NOISE_BYTES
                    parts.append(
                        f"resident {format_bytes(predicted)} predicted, nothing measured beside the program"
                    )
                continue
            error = predicted / found - 1
            noise_bytes = 0 if self.program_bytes is None else CPU_NOISE_BYTES
            is_below = self.is_bound and error > 0
            agrees &= is_below or abs(error) <= tolerance or abs(predicted - found) <= noise_bytes
            difference = f"{error:+.1%}"
            if abs(error) > tolerance and abs(predicted - found) <= noise_bytes:
                difference = f"differences below {format_bytes(noise_bytes)} are the program's own"
            parts.append(
                f"{name} {format_bytes(predicted)} predicted, {format_bytes(found)} measured ({difference})"
            )
        if not agrees and self.predicted.device_interval is not None:
            parts += self.predicted.device_interval.reasons
        warning = "" if agrees else f"warning: more than {tolerance:.0%} off: "
        return f"{warning}memory of step {CHECKED_STEP}: {'; '.join(parts)}", agrees

    def keep(self, measured: MemoryPeak) -> None:
        """Store prediction and measurement with the past errors of this machine.

        measured: as `measured` returns it.
        """
        if self.circumstances is None or measured.reserved_bytes is None:
            return
        context_bytes = _context_bytes() if self.program_bytes is None else None
        predicted_bytes = self.predicted.peak_reserved_bytes
        add_residual(
            Residual(self.circumstances, predicted_bytes, measured.reserved_bytes, context_bytes)
        )


def _context_bytes() -> int | None:
    """Return the bytes that this process uses on its card in addition to what PyTorch has reserved.

    Returns None if NVML does not report them, as in most containers.
    """
    for process in (process for card in read_cards() for process in card.processes):
        if process.pid == os.getpid() and process.used_bytes is not None:
            return max(process.used_bytes - torch.cuda.memory_reserved(), 0) or None
    return None


def run_device(device: torch.device) -> Device:
    """Return the card that torch means by `device`, found by its UUID.

    torch may count cards in another order than NVML.
    """
    cards = this_machine()
    if device.type == "cpu" or not cards:
        return cpu_device()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    card = next((card for card in cards if (card.uuid or "").endswith(uuid)), cards[0])
    if card.free_bytes is None:  # There is no NVML. Asking CUDA is fine, since the run starts it.
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return replace(card, free_bytes=free_bytes, used_bytes=total_bytes - free_bytes)
    return card


def reserved_before(device: torch.device) -> int:
    """Return what PyTorch has reserved on the card before the run, for example in a notebook.

    What the run reserves in addition then differs from the prediction. 0 on a CPU.
    """
    if device.type == "cpu":
        return 0
    release_workspaces(device)
    return torch.cuda.memory_reserved(device)


def predict_second_step(
    config: RunConfig, train: Examples, *, device: torch.device, num_ranks: int = 1
) -> SelfCheck:
    """Predict the memory of the second step, as the first of `num_ranks` processes.

    Raises whatever recording the step raises; the run itself does not need the prediction.
    """
    target = run_device(device)
    # Balanced routing is close to what is measured; the worst case would be only an upper bound.
    config = with_routing(config, "balanced")
    seen = batches(train, rows_per_step=config.batch.rows_per_step, seed=config.train.seed)
    passes = list(_passes(seen, config.optim.name, num_ranks))
    num_shards = shards_of(config.model, num_ranks)
    training = predict_run(config, target, passes=passes, num_shards=num_shards).training
    if device.type == "cuda" and num_shards == 1:
        # on a CPU only the used part of the bucket is resident
        training = with_bucket(training, num_ranks)
    else:
        # What the preparation freed is given back before the first step, so it must not count as
        # the program's memory.
        trim_heap()
    if num_shards > 1:  # the outcome says nothing about other predictions
        return SelfCheck(training, program_bytes(device), is_bound=True)
    return SelfCheck(training, program_bytes(device), circumstances(target, config.model.source))


def _passes(seen: Iterator[Batch], optimizer: str, num_ranks: int) -> Iterator[Pass]:
    """Yield the passes that the run will do: the optimizer's state, and then its first two steps.

    `Guard.release_trial_memory` has given back what a card allocates before them.
    """
    if not OPTIMIZERS[optimizer].state_comes_late:
        yield Pass("state")
    for batch in islice(seen, CHECKED_STEP):
        sizes = _sizes(split_by_rank(batch, num_ranks)[0])
        yield Pass("train", sizes, most_micro_batches=MOST_MICRO_BATCHES)


def _sizes(batch: Batch) -> tuple[tuple[int, int], ...]:
    return tuple((len(row), row.num_targets) for row in batch.rows)
