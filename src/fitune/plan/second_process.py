"""Work in a second process beside this one, where the machine has a second core: a plan records twice as fast."""

import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any


@contextmanager
def in_second_process(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Begins `work` in a copy of this process. Yields what waits for its value, and returns None where there is none:
    on one core, where forking is not safe (Windows, macOS), or when the other process fails; whoever asks does the work
    himself then."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or multiprocessing.current_process().daemon:
        yield lambda: None
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, sender), daemon=True)
    try:
        process.start()
    except OSError:  # no room for another process
        yield lambda: None
        return
    sender.close()

    def wait() -> Any:
        try:
            return receiver.recv()
        except EOFError:
            return None

    try:
        yield wait
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(work: Callable[[], Any], sender: Connection) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the parent's pool of threads is not in this process
    # Ctrl-C reaches this process too, and is for the parent to answer
    with contextlib.suppress(Exception, KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
        sender.send(work())
    os._exit(0)  # nothing of the parent's is to be wound up here
