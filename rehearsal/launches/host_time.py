"""Measures what a step costs the host: seconds of processor time of fitune's step and of the loops of others at the
same micro-batches, in turns.

    python -m rehearsal.run python -m rehearsal.launches.host_time
    python -m rehearsal.run python -m rehearsal.launches.host_time --models minimind2 --rounds 3

Kernels do nothing on the rehearsed card, so what is left of a step is Python, autograd, the dispatcher and the
allocator. Every measurement is a process of its own, one after another (A, B, C, A, B, C), and the least of its rounds
counts for a loop: what else the machine does only adds.
"""

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

os.environ.setdefault("FAKE_COPY_MAX", str(1 << 12))
os.environ.setdefault("FAKE_FILL", "0")

import torch
import transformers

from rehearsal.launches.count import apart, chosen
from rehearsal.launches.loops import LOOPS, MODELS, Done

NUM_WARM, NUM_MEASURED = 3, 8
MOST_SECONDS = 180.0
SAME_MICRO_BATCHES = (
    "fitune",
    "fitune, 4 samples at a time",
    "minimind, padded to the longest",
    "Trainer, bf16",
    "SFTTrainer, padding-free, no checkpointing",
    "SFTTrainer, padding-free, Liger, no checkpointing",
)
"""Each takes four samples at a time, but for the first, which is fitune as it chooses."""


def measure(loop: Callable[[Callable[[], None]], None]) -> dict[str, float]:
    """Seconds of processor time, all threads together, of the cheapest step and of the middle one."""
    ends: list[float] = []

    def ended() -> None:
        if len(ends) == NUM_WARM:
            gc.collect()
        ends.append(time.process_time())
        if len(ends) == NUM_WARM + NUM_MEASURED:
            raise Done

    torch.set_num_threads(1)
    with suppress(Done):
        loop(ended)
    steps = sorted(
        after - before
        for before, after in zip(ends[NUM_WARM:-1], ends[NUM_WARM + 1 :], strict=True)
    )
    return {"least": steps[0], "median": steps[len(steps) // 2]}


def measure_in_turns(
    model: str, loops: Sequence[str], rounds: int
) -> Mapping[str, dict[str, float | str]]:
    """By loop; what did not end says why."""
    told: dict[str, dict[str, float | str]] = {}
    for number in range(rounds):
        for name in loops:
            of_round = apart(
                partial(measure, partial(LOOPS[name], MODELS[model])), limit=MOST_SECONDS
            )
            print(f"{model}, round {number + 1}, {name}: {json.dumps(of_round)}", flush=True)
            known = told.get(name)
            if (
                known is None
                or "failure" in known
                or of_round.get("least", 1e9) < float(known["least"])
            ):
                told[name] = of_round
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loops", default=";".join(SAME_MICRO_BATCHES), help="separated by semicolons"
    )
    parser.add_argument("--models", default="minimind2-small", help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    models, loops = (
        chosen(parser, options.models, [*MODELS]),
        chosen(parser, options.loops, [*LOOPS]),
    )
    if "FAKE_CARD" not in os.environ:
        sys.exit(
            "the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.launches.host_time"
        )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    import trl  # noqa: F401 (once for all children)

    for model in models:
        for name, told in measure_in_turns(model, loops, options.rounds).items():
            shown = (
                told.get("failure")
                or f"{told['least'] * 1000:,.1f} ms, median {told['median'] * 1000:,.1f} ms"
            )
            print(f"{model} | {name} | {shown}")


if __name__ == "__main__":
    main()
