"""Lets a run finish and save its step before SIGINT or SIGTERM ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Append SIGINT and SIGTERM to the yielded list instead of acting on them.

    A second signal of the same kind acts as usual. Only the main thread may set signal handlers;
    in any other thread, such as a notebook's worker, signals act as usual.
    """
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def record(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.getsignal(number)
            signal.signal(number, record)
    except ValueError:
        previous.clear()
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
