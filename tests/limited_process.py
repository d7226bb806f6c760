"""Trains by a configuration in a process whose data segment (RLIMIT_DATA) is limited once everything is loaded.

    python limited_process.py CONFIG HEADROOM_MIB [FIRST LAST LEFT_MIB]

After step FIRST and until step LAST only LEFT_MIB are left, as if another process had taken the rest. A HEADROOM_MIB of
0 is no limit.
"""

import resource
import sys
from typing import Any

import fitune
from fitune.cli.progress import TrainingProgress
from fitune.recovery.guard import Guard
from fitune.run.metrics import StepMetrics
from fitune.training import prepare
from fitune.units import MIB


def data_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def main(config: str, headroom_mib: str, *hog: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    first, last, left_mib = map(int, hog or (0, 0, 0))
    start, step = Guard.start, TrainingProgress.step
    limit = 0

    def limited_start(guard: Guard) -> None:
        nonlocal limit
        limit = data_bytes() + int(headroom_mib) * MIB
        if int(headroom_mib):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        start(guard)

    def hogged_step(watcher: TrainingProgress, metrics: StepMetrics, **options: Any) -> None:
        if hog and metrics.step in (first, last):
            left = data_bytes() + left_mib * MIB if metrics.step == first else limit
            resource.setrlimit(resource.RLIMIT_DATA, (left, hard))
        step(watcher, metrics, **options)

    for prediction in ("choose_plan", "predict_second_step"):
        setattr(
            prepare, prediction, None
        )  # they take longer than the training, and change nothing here
    Guard.start, TrainingProgress.step = limited_start, hogged_step  # type: ignore[method-assign]
    fitune.train(config, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
