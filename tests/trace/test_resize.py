"""Loops written by hand: a first pass for other rows gives the later ones their sizes."""

from collections.abc import Sequence

import pytest

from fitune.trace.recording import Birth, Recording, Rule, Where, Work, make_recording
from fitune.trace.resize import resize

KINDS = ("train", "train")


def steps(num_steps: int, sizes: Sequence[int], later: Sequence[int] | None = None, *, more: int = 0) -> Recording:
    """Steps of one operator each that makes tensors of these sizes; `later` from the second step on, where the work
    has `more` bytes."""
    births, work = [], []
    for step in range(1, num_steps + 1):
        where = Where("backward", step, 0, "head")
        its = sizes if step == 1 or later is None else later
        rules = [Rule("mm", (size,), 0, 1) for size in its]
        births += [Birth(size, "temporary", where, "mm", -1, None, rule) for size, rule in zip(its, rules, strict=True)]
        num_bytes = sum(its) + (more if step > 1 else 0)
        work.append(Work("backward", step, 0, "", -1, "mm", "float32", len(its), num_bytes, 0))
    return make_recording(births, work)


def test_a_later_step_gets_the_sizes_that_the_first_one_has_for_other_rows() -> None:
    found = resize(steps(2, [10, 20, 10], [20, 10]), steps(1, [15, 30, 15]), kinds=KINDS, num_short=1)
    assert found is not None
    assert found.num_bytes.tolist() == [15, 30, 15, 30, 15]
    assert [found.rules[rule].arguments for rule in found.rule.tolist()] == [(15,), (30,), (15,), (30,), (15,)]


def test_sizes_that_happen_to_be_equal_are_told_apart_by_their_order() -> None:
    found = resize(steps(2, [10, 10]), steps(1, [15, 10]), kinds=KINDS, num_short=1)
    assert found is not None
    assert found.num_bytes.tolist() == [15, 10, 15, 10]


def test_what_a_later_step_moves_besides_stays_as_it_is() -> None:
    found = resize(steps(2, [10], more=7), steps(1, [15]), kinds=KINDS, num_short=1)
    assert found is not None
    assert [work.num_bytes for work in found.work] == [15, 22]


@pytest.mark.parametrize(
    ("recording", "short"),
    [
        (steps(2, [10], [12]), steps(1, [15])),
        (steps(2, [10, 10], [10]), steps(1, [15, 16])),
        (steps(2, [10]), steps(1, [15, 15])),
    ],
    ids=["a size that was not there", "equal sizes that part", "another first step"],
)
def test_nothing_is_guessed(recording: Recording, short: Recording) -> None:
    assert resize(recording, short, kinds=KINDS, num_short=1) is None
