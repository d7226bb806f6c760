"""Kills a training run at random moments and lets it go on; in the end it must be that of a run that was left alone.

    python benchmarks/kill.py [--kills 100] [--seed 0] [--output FILE.json]

Each run is a forked process that gets SIGKILL at a random moment: every third time of the whole run, else of what
comes once it evaluates, steps or saves, which is the shorter part of so small a run. It is started again (`--resume`,
or the first command where nothing was written yet) and killed again, up to three times; then it may end. Its weights,
its metrics and the last hash of its journal must be those of the run that was left alone. Exit code 1 where one is not.
"""

import argparse
import functools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from fitune.cli import app  # noqa: E402
from fitune.data import examples  # noqa: E402
from fitune.run.directory import RunDirectory, read_run  # noqa: E402
from fitune.run.journal import read_journal  # noqa: E402
from fitune.run.metrics import read_events  # noqa: E402
from fitune.train import checkpoint, guard, loop, monitor, prepare  # noqa: E402, F401
from tiny_run import save_tiny_model, write_config, write_dialogues  # noqa: E402

MOST_KILLS_PER_RUN = 3
STAGES = ("starting", "tokenising", "evaluating", "stepping", "saving")
TRAINED = STAGES[2:]
POLL_SECONDS = 0.001
KINDS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("model.method=lora", "model.lora.dropout=0.2"),
    "bfloat16": ("model.precision=bfloat16",),
    "padded": ("data.packing=false",),
}
TIMES = {"seconds", "tokens_per_second", "device_used_bytes", "peak_allocated_bytes", "peak_reserved_bytes"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=lambda name: Path(name).resolve())
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        save_tiny_model(Path("tiny"))
        write_dialogues(Path("sft.jsonl"), 200)
        write_config(Path("sft.yaml"), {"train": {"steps": 24, "save_every": 2, "eval_every": 6}})
        killed, faults = _kill_all(arguments.kills, draw)
    for fault in faults:
        print(f"WRONG  {fault}")
    print(f"{killed.total()} kills: {', '.join(f'{number} while {stage}' for stage, number in killed.most_common())}")
    print(f"{len(faults)} runs differ from the one that was left alone")
    if arguments.output:
        arguments.output.write_text(json.dumps({"killed_while": dict(killed), "faults": faults}, indent=2) + "\n")
    return 1 if faults else 0


def _kill_all(num_kills: int, draw: random.Random) -> tuple[Counter[str], list[str]]:
    """(how often a run was killed in each stage, what was wrong)."""
    killed: Counter[str] = Counter()
    faults: list[str] = []
    alone: dict[str, tuple[_Seconds, dict[str, Any]]] = {}
    number = 0
    while killed.total() < num_kills:
        kind = list(KINDS)[number % len(KINDS)]
        if kind not in alone:
            seconds = _run(f"{kind}-alone", kind)
            assert isinstance(seconds, _Seconds)
            alone[kind] = seconds, _outcome(Path("runs", f"{kind}-alone"))
        seconds, expected = alone[kind]
        wanted = min(draw.randint(1, MOST_KILLS_PER_RUN), num_kills - killed.total())
        told = []
        for _ in range(wanted):
            anywhere = draw.randrange(3) == 0
            kill_after = draw.uniform(0, seconds.total if anywhere else seconds.trained)
            stage = _run("run", kind, kill_after=kill_after, once_trained=not anywhere)
            if isinstance(stage, str):
                killed[stage] += 1
                told.append(stage)
        _run("run", kind)
        outcome = _outcome(Path("runs/run"))
        if differing := [name for name in expected if outcome[name] != expected[name]]:
            faults.append(f"{kind}, killed while {' and '.join(told)}: {', '.join(differing)}")
            shutil.copytree("runs/run", Path(tempfile.gettempdir()) / f"killed-{number}", dirs_exist_ok=True)
        shutil.rmtree("runs/run")
        number += 1
    return killed, faults


class _Seconds(NamedTuple):
    """How long a run took, and how long of it from its first evaluation on."""

    total: float
    trained: float


def _run(name: str, kind: str, *, kill_after: float | None = None, once_trained: bool = False) -> str | _Seconds:
    """Start the run or let it go on. The stage in which it was killed; where it ended before, how long it took.
    kill_after: seconds from the start, or from the first evaluation, step or save."""
    run = RunDirectory(Path("runs", name))
    if run.config.exists():
        arguments = ["train", "--resume", str(run.path)]
    else:
        arguments = ["train", "sft.yaml", f"run.name={name}", *KINDS[kind]]
    stage = mmap.mmap(-1, 1)
    child = os.fork()
    if child == 0:
        try:
            os._exit(_be_the_run(arguments, stage))
        except BaseException:
            traceback.print_exc()
        os._exit(70)
    start, status = time.perf_counter(), None
    trained_from = None if once_trained else start
    first_trained = None
    while status is None:
        ended, waited = os.waitpid(child, os.WNOHANG)
        now = time.perf_counter()
        if ended:
            status = waited
        elif first_trained is None and STAGES[stage[0]] in TRAINED:
            first_trained = now
            trained_from = trained_from or now
        elif kill_after is not None and trained_from is not None and now >= trained_from + kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        else:
            time.sleep(POLL_SECONDS)
    if os.WIFSIGNALED(status):
        return STAGES[stage[0]]
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"fitune {' '.join(arguments)} ended with {status}:\n{Path('stderr').read_text()}")
    return _Seconds(now - start, now - (first_trained or start))


def _be_the_run(arguments: list[str], stage: mmap.mmap) -> int:
    """The exit code. Tables are written anew each time, so that tokenising is killed too."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)  # a tiny model's threads would only wait for each other
    with tempfile.TemporaryDirectory(dir=".") as cache:
        os.environ["FITUNE_CACHE"] = cache
        setattr(prepare, "choose_plan", None)  # noqa: B010 most of the time of so small a run, and no matter here
        _tell_stage(examples, "_tokenise", stage)
        _tell_stage(guard, "safe_step", stage, "stepping")
        _tell_stage(guard, "safe_evaluate", stage, "evaluating")
        _tell_stage(checkpoint.CheckpointWriter, "_write", stage, "saving")
        return app.main(arguments)


def _tell_stage(owner: Any, name: str, stage: mmap.mmap, told: str = "tokenising") -> None:
    """Mark the stage while that function runs."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with _in_stage(stage, told):
            return function(*arguments, **options)

    setattr(owner, name, wrapped)


@contextmanager
def _in_stage(stage: mmap.mmap, told: str) -> Iterator[None]:
    before = stage[0]
    stage[0] = STAGES.index(told)
    try:
        yield
    finally:
        stage[0] = before


def _outcome(path: Path) -> dict[str, Any]:
    """All that must be equal."""
    run = RunDirectory(path)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {
        "state": read_run(path).state,
        "weights": _bytes(run.last),
        "best weights": _bytes(run.best),
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "journal": read_journal(run.journal)[-1].hash,
        "failed saves": run.events.exists() and any(event.kind == "save_failed" for event in read_events(run.events)),
        "leftovers": [path.name for path in run.checkpoints.glob(".*")],
    }


def _bytes(directory: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(directory.glob("*.safetensors"))]


if __name__ == "__main__":
    sys.exit(main())
