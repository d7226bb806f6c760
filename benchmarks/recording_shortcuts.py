"""What each short cut of the recordings saves: the first plan of a model with all of them, and without one at a time.

    python benchmarks/recording_shortcuts.py [--only minimind2] [--rounds 2] [--all]

Each plan has a process of its own and an empty cache; the variants of a model run in turns. Counted are the recordings
that were made, and the processor time of the plan without imports, the least of the rounds. A short cut that saves less
than a tenth of it should go. Writes benchmarks/results/recording_shortcuts.json after each
model, with --all recording_shortcuts_all.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prediction_time import PLAN_GPU, PLANS, _with_architecture

RESULTS = Path(__file__).parent / "results" / "recording_shortcuts.json"
#: name -> what is replaced, so that the short cut is never taken
SHORTCUTS = {
    "none left out": "",
    "sizes of a longer step from its first micro-batch": "resized_point",
    "what a layer adds, from samples of another length": "with_growth_of",
    "one sample as larger micro-batches": "compare_one_sample",
}


def work(model: dict[str, Any], without: str, *, every: bool) -> dict[str, Any]:
    """Plan in this process.

    without: the method of RecordingFamily that finds nothing. every: as for `fitune plan --all`.
    """
    from fitune.config import read_config
    from fitune.planning import second_process
    from fitune.planning.search import choose_plan
    from fitune.trace.library import Recordings
    from fitune.trace.recording_family import RecordingFamily

    # the processor time of a second process would not be counted
    second_process._can_fork = lambda: False
    if without:
        setattr(RecordingFamily, without, lambda *_, **__: None)
    record, count = Recordings._record, [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return record(*arguments, **options)

    Recordings._record = counted  # type: ignore[method-assign]
    values = {
        "model": model,
        "data": {"train": "none", "max_length": 2048},
        "batch": {"effective": 24},
    }
    config = read_config(values).config
    began = time.process_time()
    plan = choose_plan(config, gpu=PLAN_GPU, search="all" if every else "brief")
    return {
        "cpu_seconds": time.process_time() - began,
        "num_recordings": count[0],
        "chosen_bytes": plan.candidates[plan.chosen or 0].predicted_device_bytes,
    }


def measure(model: dict[str, Any], without: str, *, every: bool) -> dict[str, Any]:
    with TemporaryDirectory() as cache:
        out = subprocess.run(
            [sys.executable, __file__, "--worker", json.dumps([model, without, every])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "FITUNE_CACHE": cache},
        ).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PLANS)
    parser.add_argument("--all", action="store_true", help="plans as with fitune plan --all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        model, without, every = json.loads(options.worker)
        print(json.dumps(work(model, without, every=every)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in options.only or PLANS:
        architecture, model = PLANS[name]
        with TemporaryDirectory() as directory:
            model = _with_architecture(model, architecture, Path(directory))
            rounds = [
                {
                    shortcut: measure(model, method, every=options.all)
                    for shortcut, method in SHORTCUTS.items()
                }
                for _ in range(options.rounds)
            ]
        results[name] = {
            shortcut: min((each[shortcut] for each in rounds), key=lambda each: each["cpu_seconds"])
            for shortcut in SHORTCUTS
        }
        for shortcut, found in results[name].items():
            share = found["cpu_seconds"] / results[name]["none left out"]["cpu_seconds"]
            print(
                f"{name:16} without {shortcut:52} {found['num_recordings']:3} recordings, "
                f"{found['cpu_seconds']:5.1f} s of CPU ({share:.2f})",
                flush=True,
            )
        if not options.only:
            path = RESULTS.with_stem(f"{RESULTS.stem}_all") if options.all else RESULTS
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
