"""Locks a run's directory for one process, and shows by a heartbeat that the process is alive.

The system releases a lock when its process ends. The heartbeat is the mtime of the lock file, for
file systems without locks and for processes on other machines.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from fitune.boundary import parse_json
from fitune.plain_files import open_plain, read_plain

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0


def is_locked(lock: Path) -> bool | None:
    """Return whether a process holds the lock, or None if the file system has no locks."""
    try:
        descriptor = open_plain(lock, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    except OSError:
        return False
    try:
        got = try_lock(descriptor, attempts=1)
        return None if got is None else not got
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, attempts: int = 5) -> bool | None:
    """Try to lock the file, and return whether that succeeded.

    It takes several attempts, because a process that reads the run's state holds the lock for a
    moment. The system releases a lock when its process ends. Returns None if the file system has no
    locks; then there is only the heartbeat.
    """
    for attempt in range(attempts):
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if attempt + 1 < attempts:
                time.sleep(0.05)
        except OSError:
            return None
    return False


def has_heartbeat(lock: Path, *, elsewhere: bool) -> bool:
    """Return whether a process has recently updated the heartbeat.

    elsewhere: count only a process of another machine, whose locks may be invisible here.
    """
    try:
        silence = time.time() - lock.stat().st_mtime
        host = parse_json(read_plain(lock))["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(host != socket.gethostname() or not elsewhere) and silence < SILENCE_SECONDS


def lock_holder(lock: Path) -> str:
    """Name the process that holds the lock, for a message."""
    try:
        holder = parse_json(read_plain(lock))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def holder_here(lock: Path) -> int | None:
    """Return the id of this machine's process that holds the lock; None if none is known to.

    The file alone is not believed, since it may come from elsewhere: the process has it open.
    """
    if not is_locked(lock):
        return None
    try:
        holder = parse_json(read_plain(lock))
        if holder["host"] != socket.gethostname():
            return None
        process = psutil.Process(holder["pid"])
        files = {Path(file.path) for file in process.open_files()}
        return process.pid if lock.resolve() in files else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


@contextmanager
def heartbeat(lock: Path, descriptor: int) -> Iterator[None]:
    """Write to the locked file which process holds it, and update its mtime while that works."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    stopped = threading.Event()
    heart = threading.Thread(target=_beat, args=(lock, stopped), name="heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stopped.set()
        heart.join()
        with suppress(OSError):
            # without a heartbeat, other machines need not wait until it has been silent
            os.utime(lock, (0, 0))


def _beat(lock: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # if the disk is unavailable for a while, the next try may succeed
            os.utime(lock)
