"""Signals at a dozen random moments; benchmarks/kill.py sends two hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parents[2] / "benchmarks" / "kill.py"


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_killed_run_goes_on_as_if_it_had_not_been() -> None:
    done = subprocess.run(
        [sys.executable, KILL, "--kills", "12"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 runs differ from the one that was left alone" in done.stdout
