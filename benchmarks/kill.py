"""Kills a training run at random moments and lets it go on; in the end it must be that of a run that was left alone.

    python benchmarks/kill.py [--kills 200] [--seed 0] [--seconds 3600] [--output FILE.json]

Each run is a forked process that gets a signal at a random moment: every third time of the whole run, every third time
of what comes once it evaluates, steps or saves, else while it does one thing that is drawn (it tokenises, goes on,
evaluates, steps, saves). SIGKILL half of the time, else SIGTERM, SIGINT once or twice, SIGHUP, SIGQUIT, SIGABRT. It is
started again (`--resume`, or the first command where nothing was written yet) and killed again, up to three times; then
it may end. Every third run is exported too, killed while it is. Weights, best weights, metrics, evaluations row by row,
the last hash of the journal and what is exported must be those of the run that was left alone, and a signal that can be
answered must end the process without a traceback. Exit code 1 where one is not.
"""

import argparse
import functools
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from fitune.batch_size import growth as batch_mode  # noqa: E402
from fitune.cli import app  # noqa: E402
from fitune.data import examples  # noqa: E402
from fitune.model import save  # noqa: E402
from fitune.recovery import guard  # noqa: E402
from fitune.run.directory import RunDirectory, read_run  # noqa: E402
from fitune.run.journal import read_journal  # noqa: E402
from fitune.run.metrics import read_events, read_summary  # noqa: E402
from fitune.training import loop, prepare, resume, train  # noqa: E402, F401
from fitune.training.checkpoint import write  # noqa: E402
from fitune.watch import monitor  # noqa: E402, F401
from tiny_models import TINY_DROPOUT  # noqa: E402
from tiny_run import save_tiny_model, write_config, write_dialogues  # noqa: E402

MOST_KILLS_PER_RUN = 3
STAGES = ("starting", "tokenising", "going on", "evaluating", "stepping", "saving", "exporting")
TRAINED = STAGES[3:6]
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 300.0
EXPORTED = "exported"
GROWING = (
    "train.steps=null",
    "train.epochs=1",
    "data.max_rows=110",
    "batch.effective=4",
    "batch.micro=2",
)
KINDS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("model.method=lora",),
    "lora with dropout": ("model.method=lora", "model.lora.dropout=0.2"),
    "qlora": ("model.method=qlora",),
    "dropout": ("model.source=dropout",),
    "bfloat16": ("model.precision=bfloat16",),
    "autocast": ("model.precision=autocast_bfloat16",),
    "padded": ("data.packing=false",),
    "mixture": (
        "data.train=[{path: sft.jsonl, weight: 0.7}, {path: few.jsonl, weight: 0.03}, {path: more.jsonl}]",
    ),
    "adafactor": ("optim.name=adafactor",),
    "adamw_8bit": ("optim.name=adamw_8bit",),
    "anneal": ("train.batch_mode=anneal", "optim.schedule=cosine", *GROWING),
    "follow": ("train.batch_mode=follow", *GROWING),
    "hold": ("train.batch_mode=hold", *GROWING),
    "evaluated at every step": ("train.eval_every=1", "train.save_every=3"),
    "worse and worse": ("optim.lr=1.0", "optim.warmup=0.9", "train.eval_every=2"),
}
SIGNALS: tuple[tuple[int, ...], ...] = (
    *[(int(signal.SIGKILL),)] * 6,
    (int(signal.SIGTERM),),
    (int(signal.SIGINT),),
    (int(signal.SIGINT), int(signal.SIGINT)),
    (int(signal.SIGHUP),),
    (int(signal.SIGQUIT),),
    (int(signal.SIGABRT),),
)
ANSWERED = {0, 128 + int(signal.SIGINT), 128 + int(signal.SIGTERM)}
TIMES = {
    "seconds",
    "tokens_per_second",
    "device_used_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no further run after so many"
    )
    parser.add_argument("--output", type=lambda name: Path(name).resolve())
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        save_tiny_model(Path("tiny"))
        save_tiny_model(Path("dropout"), TINY_DROPOUT)
        write_dialogues(Path("sft.jsonl"), 200)
        write_dialogues(Path("few.jsonl"), 20, seed=1)
        write_dialogues(Path("more.jsonl"), 50, seed=2)
        write_config(Path("sft.yaml"), {"train": {"steps": 24, "save_every": 2, "eval_every": 6}})
        killed = Kills()
        _kill_all(killed, arguments.kills, draw, until)
        os.chdir("/")
    for fault in killed.faults:
        print(f"WRONG  {fault}")
    for name in ("stage", "signal", "kind"):
        counts: Counter[str] = getattr(killed, name)
        print(f"{name}: {', '.join(f'{number} {what}' for what, number in counts.most_common())}")
    print(f"{killed.stage.total()} kills in {killed.num_runs} runs")
    print(f"{len(killed.faults)} runs differ from the one that was left alone")
    if arguments.output:
        content: dict[str, Any] = {
            name: dict(getattr(killed, name)) for name in ("stage", "signal", "kind")
        }
        content |= {"kills": killed.stage.total(), "runs": killed.num_runs, "faults": killed.faults}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if killed.faults else 0


@dataclass
class Kills:
    """What was killed so far. stage, signal, kind: how often in each. faults: what was wrong, a sentence each."""

    stage: Counter[str] = field(default_factory=Counter)
    signal: Counter[str] = field(default_factory=Counter)
    kind: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_runs: int = 0


@dataclass(frozen=True)
class Moment:
    """When to kill. seconds: after the start, or with `stage` after that stage was entered for the `entry`th time, or
    with `once_trained` after the first evaluation, step or save."""

    seconds: float
    stage: str | None = None
    entry: int = 1
    once_trained: bool = False


class Ended(NamedTuple):
    """How a process ended that was not killed, or answered its signal. entries: how often each stage was entered."""

    code: int
    total_seconds: float
    trained_seconds: float
    entries: dict[str, int]
    stage: str


def _kill_all(killed: Kills, num_kills: int, draw: random.Random, until: float) -> None:
    alone: dict[str, tuple[Ended, dict[str, Any]]] = {}
    while killed.stage.total() < num_kills and time.monotonic() < until:
        kind = list(KINDS)[killed.num_runs % len(KINDS)]
        name = f"{list(KINDS).index(kind)}-alone"
        if kind not in alone:
            ended = _process(_command(name, kind), None)
            _process(_export(name), None)
            alone[kind] = ended, _outcome(Path("runs", name))
        whole, expected = alone[kind]
        told: list[str] = []
        for _ in range(draw.randint(1, MOST_KILLS_PER_RUN)):
            _kill(_command("run", kind), _moment(draw, whole), draw, killed, told, kind)
        _process(_command("run", kind), None)
        if killed.num_runs % 3 == 0:
            moment = Moment(draw.uniform(0, 0.3), "exporting" if draw.randrange(2) else None)
            _kill(_export("run"), moment, draw, killed, told, kind)
        if not Path(
            "runs/run", EXPORTED
        ).exists():  # whole or not at all, however its process ended
            _process(_export("run"), None)
        outcome = _outcome(Path("runs/run"))
        if differing := [name for name in expected if outcome[name] != expected[name]]:
            killed.faults.append(
                f"{kind}, killed while {' and '.join(told)}: {', '.join(differing)}"
            )
            shutil.copytree(
                "runs",
                Path(tempfile.gettempdir()) / f"killed-{killed.num_runs}",
                dirs_exist_ok=True,
            )
        shutil.rmtree("runs/run")
        killed.num_runs += 1


def _moment(draw: random.Random, whole: Ended) -> Moment:
    how = draw.randrange(3)
    if how == 0:
        return Moment(draw.uniform(0, whole.total_seconds))
    if how == 1:
        return Moment(draw.uniform(0, whole.trained_seconds), once_trained=True)
    stage = draw.choice(STAGES[1:6])
    return Moment(draw.uniform(0, 0.02), stage, draw.randint(1, max(whole.entries[stage], 1)))


def _kill(
    arguments: list[str],
    moment: Moment,
    draw: random.Random,
    killed: Kills,
    told: list[str],
    kind: str,
) -> None:
    numbers = draw.choice(SIGNALS)
    ended = _process(arguments, moment, numbers)
    name = signal.Signals(numbers[0]).name + " twice" * (len(numbers) - 1)
    if ended.code == 0:
        return
    killed.stage[ended.stage] += 1
    killed.signal[name] += 1
    killed.kind[kind] += 1
    told.append(f"{ended.stage} ({name})")
    said = Path("stderr").read_text(errors="replace")
    is_answer = numbers[0] in (signal.SIGTERM, signal.SIGINT)
    if ended.code not in ({-number for number in numbers} | (ANSWERED if is_answer else set())):
        killed.faults.append(f"{kind}, {told[-1]}: ended with {ended.code}\n{said}")
    elif "Traceback" in said:
        killed.faults.append(f"{kind}, {told[-1]}: a traceback\n{said}")


def _command(name: str, kind: str) -> list[str]:
    run = RunDirectory(Path("runs", name))
    if run.config.exists():
        return ["train", "--resume", str(run.path)]
    return ["train", "sft.yaml", f"run.name={name}", *KINDS[kind]]


def _export(name: str) -> list[str]:
    return ["export", f"runs/{name}", "--to", "hf", "-o", f"runs/{name}/{EXPORTED}"]


def _process(arguments: list[str], moment: Moment | None, numbers: tuple[int, ...] = ()) -> Ended:
    """Run `fitune ARGUMENTS` and send it these signals at that moment. Raises RuntimeError where it fails unkilled."""
    seen = mmap.mmap(-1, 1 + len(STAGES))
    child = os.fork()
    if child == 0:
        try:
            os._exit(_be_the_run(arguments, seen))
        except BaseException:
            traceback.print_exc()
        os._exit(70)
    start, status = time.perf_counter(), None
    first_trained = due = None
    stage = STAGES[0]
    while status is None:
        ended, waited = os.waitpid(child, os.WNOHANG)
        now = time.perf_counter()
        if ended:
            status = waited
            break
        if first_trained is None and STAGES[seen[0]] in TRAINED:
            first_trained = now
        if moment is not None and due is None:
            due = _due(moment, start, first_trained, seen, now)
        if moment is not None and due is not None and now >= due:
            stage, moment = STAGES[seen[0]], None
            for number in numbers:
                os.kill(child, number)
                time.sleep(0.01)
        if now > start + PATIENCE_SECONDS:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"fitune {' '.join(arguments)} does not end, after {numbers}")
        time.sleep(POLL_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    if code != 0 and not numbers:
        raise RuntimeError(
            f"fitune {' '.join(arguments)} ended with {code}:\n{Path('stderr').read_text()}"
        )
    entries = {name: seen[1 + number] for number, name in enumerate(STAGES)}
    return Ended(code, now - start, now - (first_trained or start), entries, stage)


def _due(
    moment: Moment, start: float, first_trained: float | None, seen: mmap.mmap, now: float
) -> float | None:
    if moment.stage is not None:
        return (
            now + moment.seconds if seen[1 + STAGES.index(moment.stage)] >= moment.entry else None
        )
    if moment.once_trained:
        return None if first_trained is None else first_trained + moment.seconds
    return start + moment.seconds


def _be_the_run(arguments: list[str], seen: mmap.mmap) -> int:
    """The exit code. Tables are written anew each time, so that tokenising is killed too."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
    ):  # whatever started this may have them ignored
        signal.signal(number, signal.SIG_DFL)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)  # a tiny model's threads would only wait for each other
    with tempfile.TemporaryDirectory(dir=".") as cache:
        os.environ["FITUNE_CACHE"] = cache
        setattr(prepare, "choose_plan", None)  # noqa: B010 most of the time of so small a run, and no matter here
        setattr(batch_mode, "LEAST_STEPS_LEFT", 3)  # noqa: B010
        _tell_stage(examples, "_tokenise", seen, "tokenising")
        _tell_stage(resume, "go_on", seen, "going on")
        _tell_stage(guard, "safe_step", seen, "stepping")
        _tell_stage(guard, "safe_evaluate", seen, "evaluating")
        _tell_stage(write.CheckpointWriter, "_write", seen, "saving")
        _tell_stage(save, "save_model", seen, "exporting")
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # as Python has it; before and after, this one is not fitune
        code = app.main(arguments)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return code


def _tell_stage(owner: Any, name: str, seen: mmap.mmap, told: str) -> None:
    """Mark the stage while that function runs."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with _in_stage(seen, told):
            return function(*arguments, **options)

    setattr(owner, name, wrapped)


@contextmanager
def _in_stage(seen: mmap.mmap, told: str) -> Iterator[None]:
    before, number = seen[0], STAGES.index(told)
    seen[0] = number
    seen[1 + number] = min(seen[1 + number] + 1, 255)
    try:
        yield
    finally:
        seen[0] = before


def _outcome(path: Path) -> dict[str, Any]:
    """All that must be equal."""
    run = RunDirectory(path)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    summary = read_summary(run.summary)
    return {
        "state": read_run(path).state,
        "weights": _bytes(run.last),
        "best weights": _bytes(run.best),
        # the model card says how long the run took
        "export": [each for each in _bytes(path / EXPORTED) if each[0] != "README.md"],
        "metrics": [
            {key: value for key, value in line.items() if key not in TIMES} for line in lines
        ],
        "evaluations": run.eval_rows.read_bytes(),
        "journal": read_journal(run.journal)[-1].hash,
        "summary": (
            summary.steps,
            summary.tokens,
            summary.eval_loss,
            summary.best_eval_loss,
            summary.train_loss,
        ),
        "failed saves": run.events.exists()
        and any(event.kind == "save_failed" for event in read_events(run.events)),
        "leftovers": [each.name for each in (*path.glob(".*"), *run.checkpoints.glob(".*"))],
    }


def _bytes(directory: Path) -> list[tuple[str, bytes]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(str(path.relative_to(directory)), path.read_bytes()) for path in files]


if __name__ == "__main__":
    sys.exit(main())
