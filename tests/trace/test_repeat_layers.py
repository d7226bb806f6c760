"""Repeats the iterations of loops that are written by hand, whose long form is known."""

from collections.abc import Sequence

import numpy as np
import pytest

from fitune.recorder.recording import (
    COLUMNS,
    RecordedAllocation,
    Recording,
    TraceWork,
    Where,
    make_recording,
)
from fitune.trace.loop_growth import Growth, transfer_growth
from fitune.trace.loop_iterations import Iterations
from fitune.trace.repeat_layers import repeat_iterations

NEVER = -1


def at(iteration: int) -> Where:
    return Where("backward", 1, 0, f"layers.{iteration}.mlp")


def backward(num_iterations: int) -> Recording:
    """Return a backward from the last layer to the first one, which is built differently.

    The gradient that a layer passes on is freed after the third allocation of the layer below, but after the first
    allocation of the first layer.
    """
    allocations = []
    for iteration in reversed(range(1, num_iterations)):
        begin = 3 * (num_iterations - 1 - iteration)
        freed_after = begin + 3 if iteration == 1 else begin + 5
        allocations.append(
            RecordedAllocation(
                64, "activation", at(iteration), "mm", freed_after, at(iteration - 1)
            )
        )
        allocations += [
            RecordedAllocation(size, "temporary", at(iteration), "mul", NEVER, None)
            for size in (32, 16)
        ]
    allocations += [
        RecordedAllocation(size, "temporary", at(0), "sum", NEVER, None) for size in (8, 4)
    ]
    return make_recording(allocations, ())


@pytest.mark.parametrize("num_iterations", [4, 5, 9])
def test_a_first_layer_that_is_built_differently_is_not_repeated(num_iterations: int) -> None:
    repeated = repeat_iterations(backward(4), Iterations("layers", 1, 4, num_iterations))
    whole = backward(num_iterations)
    assert repeated is not None
    assert repeated.labels == whole.labels
    assert all(np.array_equal(getattr(repeated, name), getattr(whole, name)) for name in COLUMNS)


ITERATIONS = Iterations("layers", 1, 4, 9)


def step_of(
    micro_batches: int,
    *,
    norm_bytes: int = 100,
    ops: Sequence[str] = ("mul",),
    in_head: Sequence[str] = ("mm",),
) -> Recording:
    """Return the last step of so many micro-batches, whose optimizer gathers one norm for each layer.

    ops: the operators of a layer
    """
    allocations, work = [], []
    for number in range(micro_batches):
        for module, names in (("layers.1.mlp", ops), ("head", in_head)):
            where = Where("backward", 1, number, module)
            allocations += [
                RecordedAllocation(64, "temporary", where, op, NEVER, None) for op in names
            ]
    last = Where("optimizer", 1, micro_batches - 1, "")
    allocations.append(RecordedAllocation(norm_bytes, "temporary", last, "stack", NEVER, None))
    work.append(
        TraceWork(
            last.phase, last.step, last.micro_batch, "", -1, "stack", "float32", 1, norm_bytes, 0
        )
    )
    return make_recording(allocations, work)


def growth_of(recording: Recording) -> Growth:
    """Return a growth of 25 bytes for each layer, of what the optimizer gathers."""
    grows = np.array([0] * (len(recording) - 1) + [25], dtype=np.int64)
    return Growth(grows, {recording.work[0].place: np.array([0, 25, 0])})


def test_what_grows_in_the_optimizer_grows_so_for_a_single_micro_batch_too() -> None:
    two, one = step_of(2), step_of(1)
    growth = transfer_growth(
        one, ITERATIONS, growth=growth_of(two), of=two, of_iterations=ITERATIONS
    )
    assert growth is not None
    assert growth.num_bytes.tolist() == growth_of(one).num_bytes.tolist()
    assert {place: sums.tolist() for place, sums in growth.work.items()} == {
        one.work[0].place: [0, 25, 0]
    }


def test_what_grows_in_the_optimizer_grows_so_whatever_the_layers_do_and_however_many_were_recorded() -> (
    None
):
    two, other = step_of(2), step_of(1, ops=("mul", "add"), norm_bytes=150)
    growth = transfer_growth(
        other,
        Iterations("layers", 2, 6, 9),
        growth=growth_of(two),
        of=two,
        of_iterations=ITERATIONS,
    )
    assert growth is not None
    assert growth.num_bytes.tolist() == growth_of(other).num_bytes.tolist()


@pytest.mark.parametrize(
    "other",
    [step_of(1, norm_bytes=104), step_of(1, in_head=("mm", "add"))],
    ids=["another size", "another operator"],
)
def test_growth_is_not_taken_over_where_something_else_happens(other: Recording) -> None:
    two = step_of(2)
    assert (
        transfer_growth(other, ITERATIONS, growth=growth_of(two), of=two, of_iterations=ITERATIONS)
        is None
    )
