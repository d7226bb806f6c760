"""Work divided between this process and a copy of it, where the machine has a second core: a plan records twice as
fast."""

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
MOST_PARTS = 256
"""The number of a part is one byte in a pipe, which a read takes whole or not at all."""


def divide(parts: Sequence[T], *, here: Callable[[T], None], beside: Callable[[T], R]) -> R | None:
    """Each process takes the next part that neither has begun. Returns what `beside` returned last; None where the copy
    took nothing or failed, and where forking is not safe (Windows, macOS) or there is no second core, so that all is
    done here: whoever asks looks at what is missing."""
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
    process = context.Process(target=_work, args=(mine, beside, sender), daemon=True)
    try:
        with contextlib.suppress(OSError):  # no room for another process
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
    while number := os.read(numbers, 1):
        yield number[0]


def _work(mine: Iterator[T], beside: Callable[[T], R], sender: Connection) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the parent's pool of threads is not in this process
    # Ctrl-C reaches this process too, and is for the parent to answer
    with contextlib.suppress(Exception, KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
        last = None
        for part in mine:
            last = beside(part)
        sender.send(last)
    os._exit(0)  # nothing of the parent's is to be wound up here
