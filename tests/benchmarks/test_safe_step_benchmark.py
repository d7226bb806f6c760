"""The benchmark of the safe step runs, and what it has measured is below the limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURE = """
import json
from dataclasses import asdict
from safe_step import measure
print(json.dumps([asdict(cost) for cost in measure(quick=True)]))
"""


def test_the_quick_benchmark_measures_both_steps() -> None:
    """In a process of its own: in one that has run long the heap has room for all of it, and no peak is seen."""
    places = os.pathsep.join(str(ROOT / name) for name in ("src", "tests", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    (cost,) = json.loads(done.stdout.splitlines()[-1])
    assert cost["num_pairs"] == 4
    assert min(cost["plain_seconds"], cost["safe_seconds"]) > 0
    assert cost["extra_peak_bytes"] < 0.5 * cost["plain_peak_bytes"]


def test_the_committed_costs_are_below_two_percent() -> None:
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    costs = json.loads((ROOT / "benchmarks" / "results" / "safe_step.json").read_text())
    assert len(costs) == 2
    for cost in costs:
        assert cost["overhead_fraction"] < 0.02
        assert cost["extra_peak_bytes"] < 0.02 * cost["plain_peak_bytes"]
        assert f"{cost['overhead_fraction']:.1%}".replace("%", " %") in page
