"""The order of the samples, and batches made ahead by a thread."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.data.batches import Epochs, batches, num_samples, num_steps, prefetch, row_order
from fitune.data.examples import Examples
from fitune.data.order import shuffled
from fitune.data.rows import Row


@dataclass(frozen=True)
class Numbered:
    """Stands for Examples: rows that are nothing but their numbers."""

    repeats: np.ndarray[Any, np.dtype[np.float32]]

    def __len__(self) -> int:
        return len(self.repeats)

    def __getitem__(self, index: int) -> Row:
        return Row(index, np.zeros(1, np.int32), np.zeros(1, np.float32))


def examples(*repeats: float) -> Examples:
    return cast(Examples, Numbered(np.array(repeats, np.float32)))


def ids(of: Examples, **arguments: Any) -> list[tuple[int, ...]]:
    return [batch.row_ids for batch in batches(of, **{"rows_per_step": 4, "seed": 0, **arguments})]


def flat(batches: list[tuple[int, ...]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_an_order_is_the_same_on_every_machine() -> None:
    assert shuffled(8, 1, 2).tolist() == [1, 3, 4, 0, 7, 6, 5, 2]


@given(num=st.integers(0, 200), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_row_is_seen_once_in_an_epoch(num: int, seed: int, epoch: int) -> None:
    assert sorted(row_order(np.ones(num, np.float32), seed=seed, epoch=epoch)) == list(range(num))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    repeats = np.ones(50, np.float32)
    orders = {
        tuple(row_order(repeats, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_the_first_place_of_an_order_is_each_row_s_about_equally_often() -> None:
    first = Counter(int(shuffled(10, seed)[0]) for seed in range(2000))
    assert min(first.values()) > 150
    assert max(first.values()) < 250


def test_the_last_batch_of_an_epoch_is_shorter() -> None:
    assert [len(batch) for batch in ids(examples(*[1] * 10), epochs=2)] == [4, 4, 2, 4, 4, 2]


@given(position=st.integers(0, 25), rows_per_step=st.integers(1, 7))
def test_a_run_continues_at_any_sample(position: int, rows_per_step: int) -> None:
    rows = examples(*[1] * 10)
    whole = flat(ids(rows, epochs=2.5))
    assert (
        flat(ids(rows, epochs=2.5, position=position, rows_per_step=rows_per_step))
        == whole[position:]
    )


def test_an_epoch_s_fraction_is_a_prefix_of_the_epoch() -> None:
    rows = examples(*[1] * 10)
    assert flat(ids(rows, epochs=0.5)) == flat(ids(rows, epochs=1))[:5]


def test_without_epochs_the_batches_do_not_end() -> None:
    endless = batches(examples(1, 1, 1), rows_per_step=2, seed=0)
    assert sum(len(next(endless).rows) for _ in range(20)) == 30


def test_without_rows_there_are_no_batches() -> None:
    assert ids(examples()) == []


def test_a_row_is_seen_as_often_as_its_source_weighs() -> None:
    seen = Counter(flat(ids(examples(2, 2, 1, 1, 0.5, 0.5, 1.5, 1.5), epochs=2)))
    assert [seen[row] for row in range(8)] == [4, 4, 2, 2, 1, 1, 3, 3]


@given(
    st.lists(st.sampled_from([0.3, 0.5, 1.0, 2.5]), max_size=12), st.floats(0, 3), st.integers(1, 5)
)
def test_the_number_of_steps_is_that_of_the_batches(
    repeats: list[float], epochs: float, rows_per_step: int
) -> None:
    rows = examples(*repeats)
    seen = ids(rows, epochs=epochs, rows_per_step=rows_per_step)
    assert num_steps(rows, rows_per_step=rows_per_step, epochs=epochs) == len(seen)
    assert num_samples(rows, epochs=epochs) == len(flat(seen))


def test_a_small_share_is_summed_up_over_the_epochs() -> None:
    """100 rows at weight 0.004 are 0.4 samples an epoch."""
    rows = examples(*[0.004] * 100, 1.0)
    seen = Counter(flat(ids(rows, epochs=50)))
    assert sum(seen[row] for row in range(100)) == 20
    assert max(seen[row] for row in range(100)) == 1
    assert seen[100] == 50


@given(st.floats(2**-12, 3, width=32), st.integers(1, 40), st.integers(1, 60))
def test_a_row_is_seen_as_often_as_it_repeats_whatever_the_weight(
    repeats: float, num: int, epochs: int
) -> None:
    rows = examples(*[repeats] * num)
    seen = flat(ids(rows, epochs=epochs))
    assert abs(len(seen) - float(np.float32(repeats)) * num * epochs) <= 0.5
    counts = Counter(seen)
    assert max(counts[row] for row in range(num)) - min(counts[row] for row in range(num)) <= 1


@given(st.lists(st.floats(2**-10, 2.5, width=32), min_size=1, max_size=8), st.integers(0, 60))
def test_a_run_of_any_weights_continues_at_any_sample(repeats: list[float], position: int) -> None:
    rows = examples(*repeats)
    whole = flat(ids(rows, epochs=40))
    assert flat(ids(rows, epochs=40, position=position)) == whole[position:]


def test_an_epoch_without_a_sample_is_passed_over() -> None:
    lengths = Epochs.of(np.array([2**-20], np.float32))
    assert lengths.find(0) == 2**19 - 1


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fitune-prefetch"]


@pytest.mark.parametrize("depth", [1, 3])
def test_items_made_ahead_come_in_their_order(depth: int) -> None:
    assert list(prefetch(iter(range(50)), depth=depth)) == list(range(50))
    assert not prefetch_threads()


def test_no_more_than_the_depth_waits() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    ahead = prefetch(items(), depth=2)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one handed out, two waiting, one in the thread's hand


def test_a_fault_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = prefetch(items(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)
    assert not prefetch_threads()


def test_closing_ends_the_thread_and_closes_what_it_read() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = prefetch(source := items(), depth=1)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert not prefetch_threads()
    assert closed == [True]
    assert next(source, None) is None


def test_batches_are_made_in_place_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_memory)
    assert list(prefetch(iter(range(5)), depth=2)) == [0, 1, 2, 3, 4]
