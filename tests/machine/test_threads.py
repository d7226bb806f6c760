"""A thread is started where there is memory for it, and nobody waits for one that cannot begin."""

import subprocess
import sys
import threading

import pytest

from fitune.machine.threads import start_thread

AT_THE_LIMIT = """
import resource, sys, threading
from pathlib import Path
from fitune.machine.threads import start_thread

earlier = threading.Thread(target=int)  # its stack is kept for the next one
earlier.start()
earlier.join()
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
mapped = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (mapped + int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(int(start_thread(threading.Thread(target=int))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
@pytest.mark.parametrize(("left_mib", "starts"), [(0, False), (64, True)])
def test_no_thread_is_waited_for_that_finds_no_memory(left_mib: int, starts: bool) -> None:
    """`Thread.start` itself would wait for ever, with a limit of exactly what is mapped."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_LIMIT, str(left_mib * 1024**2)], check=False, timeout=60
    )
    assert done.returncode == int(starts)


def test_a_thread_runs() -> None:
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)
    assert start_thread(thread)
    thread.join()
    assert ran.is_set()
