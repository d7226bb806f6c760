"""Yield the batches that the optimizer steps train on.

The order is a function of (seed, epoch), and a position in it is a number of samples. A run can
therefore be continued at any sample without the state of a random number generator.
"""

import bisect
import contextlib
import math
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fitune.data.examples import Examples
from fitune.data.order import shuffled
from fitune.data.rows import Batch
from fitune.errors import OutOfMemoryError
from fitune.machine.threads import start_thread

T = TypeVar("T")
#: the epochs that `num_steps` counts one by one
MOST_COUNTED = 10_000


@dataclass(frozen=True)
class Epochs:
    """Where each epoch begins, in samples since the start of the run.

    A sample that repeats r times is seen floor(r) times in every epoch. Of all R samples with the
    same r, a further (r - floor(r)) R are seen once more, and fractions add up over the epochs: 100
    samples that repeat 0.004 times give 0.4 samples an epoch, which is one sample in every second
    or third epoch.
    """

    #: for all samples with the same r: (samples of every epoch, further samples of an epoch)
    groups: tuple[tuple[int, Fraction], ...]

    @classmethod
    def of(cls, repeats_R: npt.NDArray[np.float32]) -> "Epochs":
        values, counts = np.unique(repeats_R, return_counts=True)
        return cls(
            tuple(
                (int(repeats) * int(count), (Fraction(float(repeats)) % 1) * int(count))
                for repeats, count in zip(values, counts, strict=True)
            )
        )

    @property
    def mean_samples(self) -> Fraction:
        return sum((whole + further for whole, further in self.groups), Fraction(0))

    def start(self, epoch: int) -> int:
        """Return the number of samples before that epoch."""
        return sum(whole * epoch + _num_further(further, epoch) for whole, further in self.groups)

    def num_samples(self, epochs: float) -> int:
        whole = int(epochs)
        before = self.start(whole)
        return before + round((epochs - whole) * (self.start(whole + 1) - before))

    def find(self, position: int) -> int:
        """Return the epoch that contains the sample at that position.

        There must be at least one sample.
        """
        beyond = 1
        while self.start(beyond) <= position:
            beyond *= 2
        return bisect.bisect_right(range(beyond + 1), position, key=self.start) - 1


def _num_further(further: Fraction, epoch: int) -> int:
    """Return how many further samples are seen before that epoch.

    The number is rounded at each epoch, not accumulated, so no fraction of a sample is lost.
    """
    return math.floor(further * epoch + Fraction(1, 2))


def row_order(
    repeats_R: npt.NDArray[np.float32], *, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the row ids of one epoch in the order in which they are seen, int64 [samples].

    The samples that are seen once more change from epoch to epoch: every sample is among them once
    before any is a second time.
    """
    parts = []
    for repeats in np.unique(repeats_R):
        rows = np.flatnonzero(repeats_R == repeats)
        parts += [rows] * int(repeats)
        further = (Fraction(float(repeats)) % 1) * len(rows)
        first = _num_further(further, epoch)
        if share := _num_further(further, epoch + 1) - first:
            rotation = shuffled(len(rows), seed, int(rows[0]))
            parts.append(
                rows[rotation[np.arange(first % len(rows), first % len(rows) + share) % len(rows)]]
            )
    samples = np.concatenate([np.zeros(0, np.int64), *parts])
    return samples[shuffled(len(samples), seed, epoch)]


def num_samples(examples: Examples, *, epochs: float = 1) -> int:
    """Return the samples seen in so many epochs, with the weights of the sources."""
    return Epochs.of(examples.repeats).num_samples(epochs)


def num_steps(examples: Examples, *, rows_per_step: int, epochs: float = 1) -> int:
    """Return the number of batches in so many epochs.

    The last, shorter batch of each epoch counts as one. Beyond MOST_COUNTED epochs the number is
    extrapolated.
    """
    lengths = Epochs.of(examples.repeats)
    whole = int(epochs)
    counted = min(whole, MOST_COUNTED)
    starts = [lengths.start(epoch) for epoch in range(counted + 1)]
    steps = sum(-(-(end - start) // rows_per_step) for start, end in pairwise(starts))
    if counted < whole:
        steps = steps * whole // counted
    return steps + -(-(lengths.num_samples(epochs) - lengths.start(whole)) // rows_per_step)


def batches(
    examples: Examples,
    *,
    rows_per_step: int,
    seed: int,
    position: int = 0,
    epochs: float | None = None,
) -> Iterator[Batch]:
    """Yield the batches from `position` on; without end unless `epochs` is given.

    position: the number of samples seen since the start of the run.

    The last, shorter batch of an epoch is not filled up from the next one. A fraction of an epoch
    ends after that fraction of its samples.
    """
    lengths = Epochs.of(examples.repeats)
    end = None if epochs is None else lengths.num_samples(epochs)
    while lengths.mean_samples and (end is None or position < end):
        epoch = lengths.find(position)
        begin = lengths.start(epoch)
        order = row_order(examples.repeats, seed=seed, epoch=epoch)
        stop = len(order) if end is None else min(len(order), end - begin)
        for first in range(position - begin, stop, rows_per_step):
            yield Batch(
                tuple(examples[int(row)] for row in order[first : min(first + rows_per_step, stop)])
            )
        position = begin + stop


def prefetch(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """Yield the same items in the same order while a thread prepares up to `depth` of them ahead.

    An exception of `items` is raised here at the same place. When this iterator is closed or
    deleted, the thread ends and `items` is closed.
    """
    ready: _Ready[T] = queue.Queue(depth)
    closed = threading.Event()

    thread = threading.Thread(
        target=_produce, args=(items, ready, closed), name="fitune-prefetch", daemon=True
    )
    # Without a thread each item is prepared when it is requested.
    if not start_thread(thread):
        yield from items
        return
    try:
        while True:
            item, error = _take(ready, thread)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()


#: an item, or the exception that ended the iterator
_Ready = queue.Queue[tuple[T | None, BaseException | None]]


def _produce(items: Iterator[T], ready: _Ready[T], closed: threading.Event) -> None:
    def put(item: T | None, error: BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    try:
        for item in items:
            put(item, None)
            if closed.is_set():
                return
        put(None, StopIteration())
    except BaseException as error:
        put(None, error)
    finally:
        if isinstance(items, Generator):
            items.close()


def _take(ready: _Ready[T], thread: threading.Thread) -> tuple[T | None, BaseException | None]:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=1)
        # Memory was too short for the thread even to report its error.
        if not thread.is_alive() and ready.empty():
            raise OutOfMemoryError("the machine's own memory ran out while a batch was prepared")
