"""Divides work between this process and a copy of it, where the machine has a second core.

A plan records twice as fast this way.
"""

import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
#: a part's number is one byte in a pipe, which one process reads whole and the other not at all
MOST_PARTS = 256


def divide(parts: Sequence[T], *, here: Callable[[T], None], in_copy: Callable[[T], R]) -> R | None:
    """Process the parts with `here` in this process and with `in_copy` in a forked copy.

    Each process takes the next part that neither has begun. Returns the last value that `in_copy`
    returned in the copy. Returns None if the copy took no part or failed; its parts may then be
    missing, and the caller must check. Also returns None where this process does all parts: where
    forking is not safe (Windows, macOS), and where there is no second core.
    """
    if len(parts) < 2 or len(parts) > MOST_PARTS or not _can_fork():
        for part in parts:
            here(part)
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    numbers, filled = os.pipe()
    os.write(filled, bytes(range(len(parts))))
    os.close(filled)
    mine = (parts[number] for number in _taken(numbers))
    process = context.Process(target=_work, args=(mine, in_copy, sender), daemon=True)
    try:
        # the machine may have no memory for another process
        with contextlib.suppress(OSError):
            process.start()
        sender.close()
        for part in mine:
            here(part)
        with contextlib.suppress(EOFError):
            return receiver.recv()  # type: ignore[no-any-return]
        return None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
        os.close(numbers)


def _can_fork() -> bool:
    is_daemon = multiprocessing.current_process().daemon
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and not is_daemon


def _taken(numbers: int) -> Iterator[int]:
    """Yield the numbers of the parts that this process takes from the pipe, until it is empty."""
    while number := os.read(numbers, 1):
        yield number[0]


def _work(mine: Iterator[T], in_copy: Callable[[T], R], sender: Connection) -> None:
    """Process parts in the copy, send the last result to the parent, and end the copy."""
    if "torch" in sys.modules:
        # a fork does not copy the parent's thread pool
        sys.modules["torch"].set_num_threads(1)
    # Ctrl-C reaches this process too, but the parent handles it
    with (
        contextlib.suppress(Exception, KeyboardInterrupt),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        last = None
        for part in mine:
            last = in_copy(part)
        sender.send(last)
    # without the parent's exit handlers, which would run twice
    os._exit(0)
