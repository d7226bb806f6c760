"""Runs that the board starts, stops and resumes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fitune.board.processes import Launcher
from fitune.errors import RunDirectoryError
from fitune.run.directory import RunDirectory, create_run
from fitune.run.lock import holder_here

#: holds the lock of a run, and writes how many signals came
HOLDER = """
import sys, time, signal
from pathlib import Path
from fitune.run.directory import RunDirectory, working_on
run = RunDirectory(Path(sys.argv[1]))
count = []
signal.signal(signal.SIGTERM, lambda *_: count.append(1))
with working_on(run):
    print("ready", flush=True)
    while not (run.path / "end").exists():
        time.sleep(0.02)
print(len(count), flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path / "runs", "first")


@pytest.fixture
def held(run: RunDirectory) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_is_stopped_by_one_signal_however_often_one_asks(
    run: RunDirectory, held: "subprocess.Popen[str]"
) -> None:
    launcher = Launcher(run.path)
    assert holder_here(run.lock) == held.pid
    for _ in range(3):
        launcher.stop(run)
    (run.path / "end").touch()
    out, _ = held.communicate(timeout=20)
    assert out == "1\n"


def test_a_lock_file_from_elsewhere_stops_no_process(run: RunDirectory) -> None:
    """It names this process, which neither holds the lock nor has the file open."""
    run.lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    with pytest.raises(RunDirectoryError, match="there is nothing to stop here"):
        Launcher(run.path).stop(run)


def test_a_process_that_fails_tells_why_as_the_command_line_does(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    started = launcher.launch("start", ["train", str(tmp_path / "none.yaml")])
    started.process.wait(60)
    [found] = launcher.launches(tmp_path)
    assert found["exit_code"] == 2
    assert "none.yaml" in str(found["error"])
    assert found["run"] is None
