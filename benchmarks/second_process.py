"""A run that shares its memory with a second process, beside one that is alone: same losses, other micro-batches.

    python benchmarks/second_process.py [--steps 24] [--rates 50 200 1000]
    python benchmarks/second_process.py --model smollm2 --steps 14 --rates 200     adapters for SmolLM2-135M

As root on Linux: `fitune train` and the second process are in one memory control group, as in a container, where the
kernel ends a process that goes beyond the limit. The second process takes real memory and gives it back, while the run
knows nothing of it but what the group has left. Runs:

    alone      without a limit; it shows what the run needs
    below      with a limit below what the first micro-batch needs
    rate N     with a limit that the run fits in; after step TAKE the second process takes 60 % of what a step needs,
               at N MiB per second, and gives it back after step GIVE

A run that the kernel ends all the same is resumed once the memory is back. Writes
benchmarks/results/second_process.json, or second_process_smollm2.json.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fitune.cli.demo import smollm2_file  # noqa: E402
from fitune.run.directory import RunDirectory  # noqa: E402
from fitune.run.journal import read_journal  # noqa: E402
from fitune.run.metrics import read_events, read_metrics  # noqa: E402
from fitune.units import MIB  # noqa: E402
from memory_group import MemoryGroup, NoControlGroupError, memory_group  # noqa: E402
from tiny_run import WIDE_VOCABULARY, save_tiny_model, write_config, write_long_dialogues  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TAKE, GIVE = 2, 6
"""Steps after which the second process begins to take, and gives back."""
TAKEN_FRACTION = 0.6
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    """kills: how often the kernel ended the run, which was then resumed. limit_bytes: None without one. taken_bytes: by
    the second process. held_bytes, peak_bytes: the least that the group used between the first step and the
    last, and the most of all, without page cache. largest_loss_difference: relative, to the run that was alone."""

    name: str
    kills: int
    limit_bytes: int | None
    taken_bytes: int
    held_bytes: int
    peak_bytes: int
    num_micro_batches: list[int]
    free_bytes: list[int | None]
    losses: list[float]
    same_rows: bool
    largest_loss_difference: float
    events: list[str]


class SecondProcess:
    """Takes and gives back memory when it is told to, in a process of its own."""

    def __init__(self, group: MemoryGroup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "memory_hog.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=group.enter,
        )

    def tell(self, taken_bytes: int, rate: float = 0.0) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        pipe.write(f"{taken_bytes} {rate}\n".encode())
        pipe.flush()

    def has_done_it(self) -> bool:
        """Whether it has done something since this was True: taken or given back what it was told to."""
        pipe = self._process.stdout
        assert pipe is not None
        done = bool(select.select([pipe], [], [], 0)[0])
        if done:
            pipe.readline()
        return done

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def train(
    group: MemoryGroup,
    arguments: list[str],
    *,
    run: RunDirectory,
    after: Callable[[int], None],
    limit_bytes: int | None = None,
) -> tuple[int, list[tuple[int, int]]]:
    """(exit code, the steps done and what the group used at each look of the run before its last step). after(step):
    told once of each step. limit_bytes: of the group once the run has begun; what comes before, the prediction, needs
    more."""
    with Path("output").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fitune", "train", *arguments],
            preexec_fn=lambda: _be_first_killed(group),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "FITUNE_CACHE": "cache"},
        )
    used: list[tuple[int, int]] = []
    told = len(_lines(run))
    while process.poll() is None:
        if limit_bytes is not None and run.config.exists():
            with suppress(OSError):  # it uses more than that yet
                group.limit(limit_bytes)
                limit_bytes = None
        for step in range(told + 1, len(_lines(run)) + 1):
            after(step)
            told = step
        if run.config.exists():
            used.append((told, group.used_bytes))
        time.sleep(LOOK_SECONDS)
    return process.returncode, [each for each in used if each[0] < told]


def _be_first_killed(group: MemoryGroup) -> None:
    group.enter()
    Path("/proc/self/oom_score_adj").write_text("1000")  # it is the run that the kernel would end


def _lines(run: RunDirectory) -> list[str]:
    return run.journal.read_text().splitlines() if run.journal.exists() else []


def measure(
    name: str,
    *,
    alone: Outcome | None = None,
    limit_bytes: int | None = None,
    taken_bytes: int = 0,
    rate: float = 0.0,
    take: int = TAKE,
    give: int = GIVE,
    hold: int | None = None,
) -> Outcome:
    """In the current directory, which `prepare` has filled. rate: bytes per second at which the memory is taken. hold:
    for so many steps after the second process has taken all it keeps it, instead of until step `give`."""
    run = RunDirectory(Path("runs", name))
    used: list[tuple[int, int]] = []
    held_steps = 0
    with memory_group() as group, _second_process(group) as second:

        def after(step: int) -> None:
            nonlocal held_steps
            if taken_bytes and step == take:
                second.tell(taken_bytes, rate)
            elif hold is None:
                if step == give:
                    second.tell(0)
            elif held_steps or second.has_done_it():
                held_steps += 1
                if held_steps == hold:
                    second.tell(0)

        code, used = train(
            group, ["sft.yaml", f"run.name={name}"], run=run, after=after, limit_bytes=limit_bytes
        )
        kills = 0
        while code == -9 and kills < 3:
            kills += 1
            second.tell(0)
            code, more = train(group, ["--resume", str(run.path)], run=run, after=lambda step: None)
            used += more
    if code != 0:
        raise RuntimeError(f"the run '{name}' ended with {code}:\n{Path('output').read_text()}")
    losses = [step.loss for step in read_metrics(run.metrics).steps]
    lines = read_journal(run.journal)
    beside = read_journal(RunDirectory(Path("runs", alone.name)).journal) if alone else lines
    pairs = list(zip(losses, alone.losses if alone else losses, strict=True))
    return Outcome(
        name=name,
        kills=kills,
        limit_bytes=limit_bytes,
        taken_bytes=taken_bytes,
        held_bytes=min(num_bytes for step, num_bytes in used if step),
        peak_bytes=max(num_bytes for _, num_bytes in used),
        num_micro_batches=[len(line.plan) for line in lines],
        free_bytes=[line.free_bytes for line in lines],
        losses=losses,
        same_rows=[line.ids_hash for line in lines] == [line.ids_hash for line in beside],
        largest_loss_difference=max(abs(a - b) / b for a, b in pairs),
        events=[f"step {event.step}: {event.message}" for event in read_events(run.events)]
        if run.events.exists()
        else [],
    )


@contextmanager
def _second_process(group: MemoryGroup) -> Iterator[SecondProcess]:
    second = SecondProcess(group)
    try:
        yield second
    finally:
        second.end()


def prepare(*, steps: int, model: str = "tiny") -> None:
    """A model whose logits are most of its memory, rows and a configuration, in the current directory."""
    write_long_dialogues(Path("sft.jsonl"), 240)
    sections: dict[str, dict[str, Any]] = {
        "batch": {"effective": 16, "micro": 16},
        "data": {"max_length": 128, "eval_fraction": 0},
        "train": {"steps": steps, "save_every": 2},
    }
    if model == "smollm2":
        sections |= {
            "model": {"source": str(smollm2_file()), "method": "lora"},
            "batch": {"effective": 8, "micro": 8},
            "data": {"max_length": 64, "eval_fraction": 0},
            "optim": {"lr": 0.0005},
        }
    else:
        save_tiny_model(Path("tiny"), WIDE_VOCABULARY)
    write_config(Path("sft.yaml"), sections)
    with Path("sft.yaml").open("a") as file:
        file.write("loss: full\n")


def measure_all(rates: list[float]) -> list[Outcome]:
    """rates: MiB per second."""
    alone = measure("alone")
    show(alone)
    need_bytes = alone.peak_bytes - alone.held_bytes
    outcomes = [
        alone,
        measure("below", alone=alone, limit_bytes=alone.held_bytes + need_bytes // 2),
    ]
    show(outcomes[-1])
    for rate in rates:
        outcomes.append(
            measure(
                f"rate-{rate:.0f}",
                alone=alone,
                # a quarter more: 16 MiB that a step leaves to others, and what comes and goes between two looks
                limit_bytes=alone.peak_bytes + need_bytes // 4,
                taken_bytes=int(TAKEN_FRACTION * need_bytes),
                rate=rate * MIB,
            )
        )
        show(outcomes[-1])
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[50, 200, 1000], help="MiB per second"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        prepare(steps=options.steps, model=options.model)
        try:
            outcomes = measure_all(options.rates)
        except NoControlGroupError as reason:
            print(f"nothing measured: {reason}")
            return
    name = "second_process" if options.model == "tiny" else f"second_process_{options.model}"
    (RESULTS / f"{name}.json").write_text(
        json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
    )


def show(each: Outcome) -> None:
    limit = "none" if each.limit_bytes is None else f"{each.limit_bytes / MIB:.0f} MiB"
    print(
        f"{each.name:10} limit {limit:>9}, used {each.held_bytes / MIB:.0f} to {each.peak_bytes / MIB:.0f} MiB, "
        f"{each.taken_bytes / MIB:.0f} MiB taken; killed {each.kills} times; same rows: {each.same_rows}; losses "
        f"differ by {each.largest_loss_difference:.1e}; micro-batches {each.num_micro_batches}",
        flush=True,
    )
    for event in each.events:
        print(f"           {event}", flush=True)


if __name__ == "__main__":
    main()
