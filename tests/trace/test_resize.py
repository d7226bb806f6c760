"""Resizes steps that are written by hand, by the first micro-batch of a step with other samples."""

from collections.abc import Sequence

import pytest

from fitune.recorder.recording import (
    NEVER,
    RecordedAllocation,
    Recording,
    Rule,
    TraceWork,
    Where,
    make_recording,
)
from fitune.trace.resize import resize, with_last_step_repeated

KINDS = ("train",)


def step(
    num_micro_batches: int,
    sizes: Sequence[int],
    later: Sequence[int] | None = None,
    *,
    more: int = 0,
    update: int = 8,
) -> Recording:
    """Return a step of micro-batches and an update.

    Each micro-batch has one operator that allocates tensors of these sizes; from the second one on, the sizes are
    `later`, and the work has `more` bytes.
    """
    allocations, work = [], []
    for micro_batch in range(num_micro_batches):
        where = Where("backward", 1, micro_batch, "head")
        its = sizes if micro_batch == 0 or later is None else later
        rules = [Rule("mm", (size,), 0, 1) for size in its]
        allocations += [
            RecordedAllocation(size, "temporary", where, "mm", -1, None, rule)
            for size, rule in zip(its, rules, strict=True)
        ]
        num_bytes = sum(its) + (more if micro_batch > 0 else 0)
        work.append(
            TraceWork("backward", 1, micro_batch, "", -1, "mm", "float32", len(its), num_bytes, 0)
        )
    where = Where("optimizer", 1, num_micro_batches - 1, "")
    allocations.append(RecordedAllocation(update, "temporary", where, "stack", -1, None))
    work.append(
        TraceWork("optimizer", 1, num_micro_batches - 1, "", -1, "stack", "float32", 1, update, 0)
    )
    return make_recording(allocations, work)


def test_a_later_micro_batch_gets_the_sizes_that_the_first_one_has_for_other_rows() -> None:
    found = resize(step(2, [10, 20, 10], [20, 10]), step(1, [15, 30, 15]), kinds=KINDS)
    assert found is not None
    assert found.num_bytes.tolist() == [15, 30, 15, 30, 15, 8]
    assert [found.rules[rule].arguments for rule in found.rule.tolist()[:-1]] == [
        (15,),
        (30,),
        (15,),
        (30,),
        (15,),
    ]


def test_an_update_of_two_micro_batches_is_no_matter_of_rows() -> None:
    found = resize(step(2, [10], update=8), step(1, [15], update=4), kinds=KINDS)
    assert found is not None
    assert found.num_bytes.tolist() == [15, 15, 8]
    assert [work.num_bytes for work in found.work] == [15, 15, 8]


def test_sizes_that_happen_to_be_equal_are_told_apart_by_their_order() -> None:
    found = resize(step(2, [10, 10]), step(1, [15, 10]), kinds=KINDS)
    assert found is not None
    assert found.num_bytes.tolist() == [15, 10, 15, 10, 8]


def test_what_a_later_micro_batch_moves_besides_stays_as_it_is() -> None:
    found = resize(step(2, [10], more=7), step(1, [15]), kinds=KINDS)
    assert found is not None
    assert [work.num_bytes for work in found.work] == [15, 22, 8]


@pytest.mark.parametrize(
    ("recording", "single"),
    [
        (step(2, [10], [12]), step(1, [15])),
        (step(2, [10, 10], [10]), step(1, [15, 16])),
        (step(2, [10]), step(1, [15, 15])),
    ],
    ids=["a size that was not there", "equal sizes that part", "another first micro-batch"],
)
def test_nothing_is_guessed(recording: Recording, single: Recording) -> None:
    assert resize(recording, single, kinds=KINDS) is None


def test_a_step_is_done_again_without_its_workspace() -> None:
    where = Where("backward", 1, 0, "head")
    update = where._replace(phase="optimizer")
    allocations = [
        RecordedAllocation(100, "parameter", Where("load", 0, 0, ""), "load", NEVER, None),
        RecordedAllocation(10, "activation", where, "mm", 2, update),
        RecordedAllocation(64, "workspace", where, "mm", NEVER, None),
        RecordedAllocation(20, "gradient", where, "mm", 3, update),
    ]
    found = with_last_step_repeated(
        make_recording(allocations, [TraceWork(*update[:3], "", -1, "mm", "float32", 1, 2, 3)]), 1
    )
    assert found is not None
    assert found.num_bytes.tolist() == [100, 10, 64, 20, 10, 20]
    assert found.freed_after.tolist() == [NEVER, 2, NEVER, 3, 4, 5]
    assert [found.labels[label].where.step for label in found.label.tolist()] == [0, 1, 1, 1, 2, 2]
    assert [work.step for work in found.work] == [1, 2]


def test_a_step_that_leaves_a_tensor_is_not_done_again() -> None:
    allocations = [
        RecordedAllocation(
            20, "optimizer_state", Where("optimizer", 1, 0, ""), "zeros", NEVER, None
        )
    ]
    assert with_last_step_repeated(make_recording(allocations, []), 1) is None
