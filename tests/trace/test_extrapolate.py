"""Loops written by hand, whose long form is known."""

from collections.abc import Sequence

import numpy as np
import pytest

from fitune.trace.extrapolate import Growth, Iterations, repeat_turns, transfer_growth
from fitune.trace.recording import COLUMNS, Birth, Recording, TraceWork, Where, make_recording

NEVER = -1


def at(turn: int) -> Where:
    return Where("backward", 1, 0, f"layers.{turn}.mlp")


def backward(num_turns: int) -> Recording:
    """From the last layer to the first, which is built differently: the gradient that a layer hands down dies behind
    the third tensor of the layer below, but behind the first one of the first layer."""
    births = []
    for turn in reversed(range(1, num_turns)):
        begin = 3 * (num_turns - 1 - turn)
        dies_after = begin + 3 if turn == 1 else begin + 5
        births.append(Birth(64, "activation", at(turn), "mm", dies_after, at(turn - 1)))
        births += [Birth(size, "temporary", at(turn), "mul", NEVER, None) for size in (32, 16)]
    births += [Birth(size, "temporary", at(0), "sum", NEVER, None) for size in (8, 4)]
    return make_recording(births, ())


@pytest.mark.parametrize("num_turns", [4, 5, 9])
def test_a_first_layer_that_is_built_differently_is_not_repeated(num_turns: int) -> None:
    repeated = repeat_turns(backward(4), Iterations("layers", 1, 4, num_turns))
    whole = backward(num_turns)
    assert repeated is not None
    assert repeated.labels == whole.labels
    assert all(np.array_equal(getattr(repeated, name), getattr(whole, name)) for name in COLUMNS)


TURNS = Iterations("layers", 1, 4, 9)


def step_of(
    micro_batches: int, *, norm_bytes: int = 100, ops: Sequence[str] = ("mul",), in_head: Sequence[str] = ("mm",)
) -> Recording:
    """The last step of so many micro-batches, and an optimizer that gathers one norm a layer. ops: of a layer."""
    births, work = [], []
    for number in range(micro_batches):
        for module, names in (("layers.1.mlp", ops), ("head", in_head)):
            where = Where("backward", 1, number, module)
            births += [Birth(64, "temporary", where, op, NEVER, None) for op in names]
    last = Where("optimizer", 1, micro_batches - 1, "")
    births.append(Birth(norm_bytes, "temporary", last, "stack", NEVER, None))
    work.append(TraceWork(last.phase, last.step, last.micro_batch, "", -1, "stack", "float32", 1, norm_bytes, 0))
    return make_recording(births, work)


def growth_of(recording: Recording) -> Growth:
    """25 bytes a layer of what the optimizer gathers."""
    grows = np.array([0] * (len(recording) - 1) + [25], dtype=np.int64)
    return Growth(grows, {recording.work[0].place: np.array([0, 25, 0])})


def test_what_grows_in_the_optimizer_grows_so_for_a_single_micro_batch_too() -> None:
    two, one = step_of(2), step_of(1)
    growth = transfer_growth(one, TURNS, growth=growth_of(two), of=two, of_turns=TURNS)
    assert growth is not None
    assert growth.num_bytes.tolist() == growth_of(one).num_bytes.tolist()
    assert {place: sums.tolist() for place, sums in growth.work.items()} == {one.work[0].place: [0, 25, 0]}


def test_what_grows_in_the_optimizer_grows_so_whatever_the_layers_do_and_however_many_were_recorded() -> None:
    two, other = step_of(2), step_of(1, ops=("mul", "add"), norm_bytes=150)
    growth = transfer_growth(other, Iterations("layers", 2, 6, 9), growth=growth_of(two), of=two, of_turns=TURNS)
    assert growth is not None
    assert growth.num_bytes.tolist() == growth_of(other).num_bytes.tolist()


@pytest.mark.parametrize(
    "other",
    [step_of(1, norm_bytes=104), step_of(1, in_head=("mm", "add"))],
    ids=["another size", "another operator"],
)
def test_growth_is_not_taken_over_where_something_else_happens(other: Recording) -> None:
    two = step_of(2)
    assert transfer_growth(other, TURNS, growth=growth_of(two), of=two, of_turns=TURNS) is None
