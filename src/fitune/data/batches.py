"""Examples -> the batches that the optimizer steps see.

The order is a function of (seed, epoch) and a place in it is a count of samples, so a run can be continued at any
sample without any generator's state.
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
MOST_COUNTED = 10_000


@dataclass(frozen=True)
class Epochs:
    """Where each epoch begins, in samples from the run's start.

    A row that repeats r times is seen floor(r) times in an epoch and, of all R rows with the same r, the share
    (r - floor(r)) R once more, summed up over the epochs: 100 rows that repeat 0.004 times are 0.4 samples an epoch,
    one in each second or third. groups: (samples of each epoch, further samples an epoch).
    """

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
        """Samples before that epoch."""
        return sum(whole * epoch + _turns(further, epoch) for whole, further in self.groups)

    def num_samples(self, epochs: float) -> int:
        whole = int(epochs)
        before = self.start(whole)
        return before + round((epochs - whole) * (self.start(whole + 1) - before))

    def find(self, position: int) -> int:
        """The epoch of the sample at that position. There must be samples at all."""
        beyond = 1
        while self.start(beyond) <= position:
            beyond *= 2
        return bisect.bisect_right(range(beyond + 1), position, key=self.start) - 1


def _turns(further: Fraction, epoch: int) -> int:
    """How many further samples are seen before that epoch: rounded, so that no share of a sample is lost."""
    return math.floor(further * epoch + Fraction(1, 2))


def row_order(repeats_R: npt.NDArray[np.float32], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The row ids of one epoch in the order in which they are seen. int64 [samples of that epoch].

    The rows that are seen once more move on with each epoch, so that every row gets its turn before any gets a second
    one.
    """
    parts = []
    for repeats in np.unique(repeats_R):
        rows = np.flatnonzero(repeats_R == repeats)
        parts += [rows] * int(repeats)
        further = (Fraction(float(repeats)) % 1) * len(rows)
        first = _turns(further, epoch)
        if share := _turns(further, epoch + 1) - first:
            turn = shuffled(len(rows), seed, int(rows[0]))
            parts.append(rows[turn[np.arange(first % len(rows), first % len(rows) + share) % len(rows)]])
    samples = np.concatenate([np.zeros(0, np.int64), *parts])
    return samples[shuffled(len(samples), seed, epoch)]


def num_samples(examples: Examples, *, epochs: float = 1) -> int:
    """Rows seen in so many epochs, by the sources' weights."""
    return Epochs.of(examples.repeats).num_samples(epochs)


def num_steps(examples: Examples, *, rows_per_step: int, epochs: float = 1) -> int:
    """Batches in so many epochs: the last, shorter batch of each epoch counts as one. Of more than MOST_COUNTED epochs
    in proportion."""
    lengths = Epochs.of(examples.repeats)
    whole = int(epochs)
    counted = min(whole, MOST_COUNTED)
    starts = [lengths.start(epoch) for epoch in range(counted + 1)]
    steps = sum(-(-(end - start) // rows_per_step) for start, end in pairwise(starts))
    if counted < whole:
        steps = steps * whole // counted
    return steps + -(-(lengths.num_samples(epochs) - lengths.start(whole)) // rows_per_step)


def batches(
    examples: Examples, *, rows_per_step: int, seed: int, position: int = 0, epochs: float | None = None
) -> Iterator[Batch]:
    """The batches from `position` on, a number of samples seen since the run's start; endless unless epochs is given.

    The last, shorter batch of an epoch is one of its own, and an epoch's fraction ends after its share of samples.
    """
    lengths = Epochs.of(examples.repeats)
    end = None if epochs is None else lengths.num_samples(epochs)
    while lengths.mean_samples and (end is None or position < end):
        epoch = lengths.find(position)
        begin = lengths.start(epoch)
        order = row_order(examples.repeats, seed=seed, epoch=epoch)
        stop = len(order) if end is None else min(len(order), end - begin)
        for first in range(position - begin, stop, rows_per_step):
            yield Batch(tuple(examples[int(row)] for row in order[first : min(first + rows_per_step, stop)]))
        position = begin + stop


def prefetch(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """The same items in the same order, made ahead by a thread, at most `depth` of them waiting.

    What `items` raises is raised here, in its place. Closing or dropping this iterator ends the thread and closes
    `items`.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def produce() -> None:
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

    thread = threading.Thread(target=produce, name="fitune-prefetch", daemon=True)
    if not start_thread(thread):  # the items are then made when they are asked for
        yield from items
        return
    try:
        while True:
            try:
                item, error = ready.get(timeout=1)
            except queue.Empty:
                if not thread.is_alive() and ready.empty():  # not even its error found memory to be told with
                    raise OutOfMemoryError("the machine's own memory ran out while a batch was prepared") from None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
