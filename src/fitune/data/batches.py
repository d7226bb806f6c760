"""Examples -> the batches that the optimizer steps see.

The order is a function of (seed, epoch) and a place in it is a count of samples, so a run can be continued at any
sample without any generator's state.
"""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fitune.data.examples import Examples
from fitune.data.order import shuffled
from fitune.data.rows import Batch
from fitune.errors import OutOfMemoryError
from fitune.threads import start_thread

T = TypeVar("T")


def row_order(repeats_R: npt.NDArray[np.float32], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The row ids of one epoch in the order in which they are seen. int64 [samples of an epoch], equal in every epoch.

    A row that repeats r times is seen floor(r) times and, of all rows with the same r, the share r - floor(r) once
    more; that share moves on with each epoch, so that every row gets its turn before any gets a second one.
    """
    parts = []
    for repeats in np.unique(repeats_R):
        rows = np.flatnonzero(repeats_R == repeats)
        whole = int(repeats)
        parts += [rows] * whole
        share = round((float(repeats) - whole) * len(rows))
        if share:
            turn = shuffled(len(rows), seed, int(rows[0]))
            parts.append(rows[turn[np.arange(epoch * share, (epoch + 1) * share) % len(rows)]])
    samples = np.concatenate([np.zeros(0, np.int64), *parts])
    return samples[shuffled(len(samples), seed, epoch)]


def num_samples(examples: Examples, *, epochs: float = 1) -> int:
    """Rows seen in so many epochs, by the sources' weights."""
    return round(epochs * len(row_order(examples.repeats, seed=0, epoch=0)))


def num_steps(examples: Examples, *, rows_per_step: int, epochs: float = 1) -> int:
    """Batches in so many epochs: the last, shorter batch of each epoch counts as one."""
    per_epoch = num_samples(examples)
    whole, rest = divmod(num_samples(examples, epochs=epochs), per_epoch) if per_epoch else (0, 0)
    return whole * -(-per_epoch // rows_per_step) + -(-rest // rows_per_step)


def batches(
    examples: Examples, *, rows_per_step: int, seed: int, position: int = 0, epochs: float | None = None
) -> Iterator[Batch]:
    """The batches from `position` on, a number of samples seen since the run's start; endless unless epochs is given.

    The last, shorter batch of an epoch is one of its own, and an epoch's fraction ends after its share of samples.
    """
    per_epoch = num_samples(examples)
    end = None if epochs is None else num_samples(examples, epochs=epochs)
    while per_epoch and (end is None or position < end):
        epoch, start = divmod(position, per_epoch)
        order = row_order(examples.repeats, seed=seed, epoch=epoch)
        stop = per_epoch if end is None else min(per_epoch, end - epoch * per_epoch)
        for first in range(start, stop, rows_per_step):
            yield Batch(tuple(examples[int(row)] for row in order[first : min(first + rows_per_step, stop)]))
        position = epoch * per_epoch + stop


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
