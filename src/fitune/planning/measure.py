"""Runs real optimizer steps of a setting on this machine, to compare them with the prediction.

The weights are random and the samples made up. Neither changes time or memory, and so a model can
be measured whose weights are not here.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import numpy as np
import torch

from fitune.config import Loss, Recompute, RunConfig
from fitune.data.rows import Batch
from fitune.errors import UsageError
from fitune.machine.out_of_memory import release_memory
from fitune.machine.process_memory import (
    MemoryPeak,
    choose_device,
    program_bytes,
    read_peak,
    reset_peak,
)
from fitune.model.load import load_config, load_model
from fitune.planning.choices import Choice, apply_choice
from fitune.planning.forecast import heaviest_rows
from fitune.planning.limits import find_lengths, find_limits
from fitune.planning.plan import Plan
from fitune.step.assemble import assemble, choose_precision
from fitune.step.work import train_step

#: (tokens, supervised tokens) of each sample of a batch
Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """The time and memory that one real step took."""

    seconds: float
    cpu_seconds: float
    #: on a CPU without the memory that the process held before the model was built
    peak: MemoryPeak


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMeasured:
    """What was measured of a plan's chosen candidate, and what was predicted.

    The time is that of steps with ordinary samples, the memory that of a step with the longest
    samples.
    """

    num_steps: int
    predicted_seconds_per_step: float | None
    measured_seconds_per_step: float
    predicted_allocated_bytes: int
    measured_allocated_bytes: int | None
    #: on a CPU the resident memory without the program's
    predicted_reserved_bytes: int
    measured_reserved_bytes: int | None


def measure_candidate(config: RunConfig, plan: Plan, *, num_steps: int = 3) -> PlanMeasured:
    """Run `num_steps` real steps of the plan's chosen candidate, and one with the longest samples.

    Raises UsageError if the plan is for another machine, and what `measure_steps` raises.
    """
    assert plan.chosen is not None
    device = choose_device()
    target = find_limits(config.memory).device
    if (target.kind == "cpu") != (device.type == "cpu") or config.memory.gpu is not None:
        raise UsageError(
            f"--measure runs on this machine, and the plan is for {target.name}: leave out --gpu"
        )
    candidate = plan.candidates[plan.chosen]
    lengths = find_lengths(config)
    choice = Choice(
        micro_rows=None if candidate.micro_tokens else candidate.micro_batch,
        micro_tokens=candidate.micro_tokens,
        recompute=cast(Recompute, candidate.recompute),
        loss=cast(Loss, candidate.loss),
        optimizer=None if candidate.optimizer == config.optim.name else candidate.optimizer,
        offloads=candidate.offload_activations and not config.model.offload_activations,
    )
    run_config = apply_choice(config, choice)
    heaviest = (
        heaviest_rows(
            choice,
            lengths,
            most_rows=run_config.batch.rows_per_step,
            packing=run_config.data.packing,
        )
        * 2
    )
    draw = np.random.default_rng(0)
    drawn = draw.choice(lengths.sample_tokens, size=(num_steps, config.batch.rows_per_step))
    supervised = lengths.supervised_fraction
    usual = [[(int(n), max(1, int(supervised * (n - 1)))) for n in rows] for rows in drawn]
    heaviest = heaviest[: max(config.batch.rows_per_step, len(heaviest) // 2)]
    first, *others = measure_steps(run_config, [heaviest, *usual], device=device)
    is_card = device.type == "cuda"
    return PlanMeasured(
        num_steps=num_steps,
        predicted_seconds_per_step=candidate.predicted_seconds_per_step,
        measured_seconds_per_step=median(each.seconds for each in others),
        predicted_allocated_bytes=candidate.predicted_allocated_bytes,
        measured_allocated_bytes=first.peak.allocated_bytes,
        predicted_reserved_bytes=candidate.predicted_reserved_bytes,
        measured_reserved_bytes=first.peak.reserved_bytes if is_card else first.peak.device_bytes,
    )


def measure_steps(
    config: RunConfig, batches: Iterable[Sizes], *, device: torch.device
) -> Iterator[MeasuredStep]:
    """Run one step for each batch, and yield what it took.

    A step runs when the next result is requested. Before the first, a step with the same batch
    warms up; its result is not yielded. Raises what `load_model`, `assemble` and a step raise.
    """
    # cached memory that is not in use would hide as much of the peak
    release_memory(device)
    before = program_bytes(device)
    model_config = config.model.model_copy(update={"init": "random"})
    precision = choose_precision(config.model, device)
    model = load_model(model_config, device, precision=precision, seed=config.train.seed)
    setup = assemble(model, config, device=device, precision=precision)
    draw = np.random.default_rng(config.train.seed)
    vocab_size = load_config(config.model).get_text_config().vocab_size

    def step(rows: Sizes) -> MeasuredStep:
        batch = Batch(
            tuple(
                setup.settings.objective.made_up_row(
                    i, draw.integers(vocab_size, size=length), num_targets
                )
                for i, (length, num_targets) in enumerate(rows)
            )
        )
        micro_batches = setup.layout.split(batch)
        reset_peak(device)
        _wait(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        train_step(
            model, setup.optimizer, micro_batches, settings=setup.settings, scaler=setup.scaler
        )
        _wait(device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return MeasuredStep(seconds, cpu_seconds, _above(read_peak(device), before))

    for number, rows in enumerate(batches):
        if number == 0:
            step(rows)
        yield step(rows)


def _above(peak: MemoryPeak, program: int | None) -> MemoryPeak:
    """Return the peak without the bytes that the program held before."""
    if program is None or peak.device_bytes is None:
        return peak
    return replace(peak, device_bytes=peak.device_bytes - program)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
