"""Threads beside the one that trains, started only where there is memory for them."""

import mmap
import sys
import threading

_NEEDED_BYTES = 12 * 1024**2
"""A stack, of 8 MiB as a rule, and the interpreter's first frame in it."""


def start_thread(thread: threading.Thread) -> bool:
    """Whether it runs now; what it would do is else to be done without it.

    Where memory ends, `Thread.start` may never return: it waits for a sign from the new thread, and one that gets a
    stack that was kept of an earlier thread, but no memory for its first frame, ends without giving it.
    """
    if sys.platform == "linux":
        try:
            mmap.mmap(-1, _NEEDED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        except (OSError, MemoryError):
            return False
    try:
        thread.start()
    except RuntimeError:  # so many threads are not allowed
        return False
    return True
