"""Measures what a step costs the host, for each loop of `rehearsal.launches.loops`: the processor time of Python and of
PyTorch's host code, since on the rehearsed card kernels take none. Writes the section of docs/rehearsal.md.

    python -m rehearsal.run python -m rehearsal.launches.host_time
    python -m rehearsal.run python -m rehearsal.launches.host_time --models minimind2 --loops "fitune;Trainer"

The loops do one step after the other in turns, each in a process of its own, so that what else the machine does meets
all of them.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("FAKE_COPY_MAX", str(1 << 16))
os.environ.setdefault("FAKE_FILL", "0")

import torch
import transformers

from rehearsal.launches.count import PAGE, chosen
from rehearsal.launches.loops import LOOPS, MODELS
from rehearsal.rows import ROOT, replace_section

RESULTS = ROOT / "docs" / "host_time.json"
BEGIN, END = "<!-- rehearsal.launches.host_time: begin -->", "<!-- rehearsal.launches.host_time: end -->"
NUM_WARM, NUM_MEASURED = 3, 9
TIMED = (
    "fitune",
    "fitune, 4 samples at a time",
    "minimind, padded to the longest",
    "Trainer, bf16",
    "SFTTrainer, padding-free, no checkpointing",
    "SFTTrainer, padding-free, Liger, no checkpointing",
)


@dataclass
class Turns:
    """A loop in a forked child, which does a step for each byte that it is sent and tells the step's seconds."""

    loop: Callable[[Callable[[], None]], None]
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    def begin(self) -> None:
        mine, its = os.pipe(), os.pipe()
        if os.fork() == 0:
            torch.cuda._is_in_bad_fork = lambda: False  # see rehearsal.compare.compare_apart
            os.environ["FAKE_SHARED"] = f"{os.environ['FAKE_SHARED']}.{os.getpid()}"  # a card of its own
            os.close(mine[1])
            os.close(its[0])
            self._do_steps(mine[0], its[1])
        os.close(mine[0])
        os.close(its[1])
        self._asks, self._told = mine[1], os.fdopen(its[0])

    def _do_steps(self, asked: int, tells: int) -> None:
        begin = 0.0

        def wait() -> None:
            nonlocal begin
            if not os.read(asked, 1):
                os._exit(0)
            begin = time.process_time()

        def ended() -> None:
            os.write(tells, f"{time.process_time() - begin}\n".encode())
            wait()

        wait()
        try:
            self.loop(ended)
        except Exception as error:
            os.write(tells, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].encode() + b"\n")
        os._exit(1)

    def step(self) -> None:
        if self.failure is not None:
            return
        os.write(self._asks, b"x")
        line = self._told.readline()
        try:
            self.seconds.append(float(line))
        except ValueError:
            self.failure = line.strip() or "the process ended"

    def end(self) -> None:
        os.close(self._asks)
        self._told.close()
        os.wait()


def measure(model: str, names: list[str]) -> dict[str, Any]:
    """Seconds of processor time of a step, the median, by loop; a text where a loop failed."""
    loops = {name: Turns(partial(LOOPS[name], MODELS[model])) for name in names}
    for each in loops.values():
        each.begin()
    for _ in range(NUM_WARM + NUM_MEASURED):
        for each in loops.values():
            each.step()
    for each in loops.values():
        each.end()
    return {name: each.failure or statistics.median(each.seconds[NUM_WARM:]) for name, each in loops.items()}


def section(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """results: by model and loop."""
    lines = [f"Median of {NUM_MEASURED} steps, in turns; fitune at 4 samples at a time, as the others, is 1.", ""]
    lines += [f"| loop | {' | '.join(results)} |", f"|---|{'---:|' * len(results)}"]
    for name in TIMED:
        cells = []
        for measured in results.values():
            found, unit = measured.get(name), measured.get("fitune, 4 samples at a time")
            if isinstance(found, float) and isinstance(unit, float):
                cells.append(f"{found / unit:.2f} ({1000 * found:.0f} ms)")
            else:
                cells.append("failed")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only these, separated by semicolons")
    parser.add_argument("--loops", default="", help="only these, separated by semicolons")
    options = parser.parse_args()
    models, loops = chosen(parser, options.models, [*MODELS]), chosen(parser, options.loops, [*TIMED])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    import trl  # noqa: F401 (once for all children)

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in models:
        results[model] = results.get(model, {}) | measure(model, loops)
        for name in loops:
            print(f"{model}, {name}: {results[model][name]}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_section(PAGE, BEGIN, END, section(results))


if __name__ == "__main__":
    main()
