"""Starts threads only if there is memory for them."""

import mmap
import sys
import threading

#: for a stack, usually of 8 MiB, and the interpreter's first frame
_NEEDED_BYTES = 12 * 1024**2


def start_thread(thread: threading.Thread) -> bool:
    """Start the thread, and return whether it runs; if not, the caller must do its work.

    If memory runs out, `Thread.start` may never return. It waits for a signal from the new thread,
    and a thread that gets the cached stack of an earlier one, but no memory for its first frame,
    ends without the signal.
    """
    if sys.platform == "linux":
        try:
            mmap.mmap(-1, _NEEDED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        except (OSError, MemoryError):
            return False
    try:
        thread.start()
    except RuntimeError:  # the limit of threads is reached
        return False
    return True
