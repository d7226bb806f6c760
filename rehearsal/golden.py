"""Golden steps: what the genuine allocator is asked for in two steps after the first, in order, for many settings.

    python -m rehearsal.run python -m rehearsal.golden                   all, to tests/golden/steps
    python -m rehearsal.run python -m rehearsal.golden --cases full-4090   these files alone
    python -m rehearsal.golden --state                                   which of them a recording equals now

`tests/trace/test_golden_steps.py` records the same settings without a card and holds each event against them. A file says
with which versions, on which card and in which setting it was made.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fitune.recorder import cuda_target
from fitune.recorder.events import MemoryEvent, MemoryTrace
from rehearsal.cases import CARDS, LoopCase, StepCase, golden_cases
from rehearsal.difference import first_difference
from rehearsal.predicted import recorded_case
from rehearsal.rows import ROOT

DIRECTORY = ROOT / "tests" / "golden" / "steps"
SUFFIX = ".json.gz"
NUM_KEPT = 2
"""Steps, the last ones of a case."""
NUM_LOOP_STEPS = 4
"""Of a loop; the first ones make the optimizer's state."""
CATALOGUE = {"4090": "RTX 4090", "A100": "A100 80GB", "H100": "H100 80GB", "T4": "T4"}
"""The rehearsed cards as fitune's catalogue names them."""


@dataclass(frozen=True)
class Golden:
    """peaks: requested bytes of each step, as the allocator counted them. trace: storages in the order of their births;
    those of step 0 were there before. An event has a size and a step, and nothing else: an allocator knows no more."""

    case: StepCase | LoopCase
    card: str
    versions: dict[str, str]
    peaks: tuple[int, ...]
    trace: MemoryTrace


def num_steps(case: StepCase | LoopCase) -> int:
    return len(case.kinds) if isinstance(case, StepCase) else NUM_LOOP_STEPS


def read_golden(path: Path) -> Golden:
    content = json.loads(gzip.decompress(path.read_bytes()))
    fields = content["case"]
    kind = {"step": StepCase, "loop": LoopCase}[content["kind"]]
    case = kind(**{name: _tuples(value) for name, value in fields.items()})
    assert isinstance(case, (StepCase, LoopCase))
    return Golden(
        case, content["card"], content["versions"], tuple(content["peaks"]), _trace(content)
    )


def write_golden(golden: Golden, path: Path) -> None:
    """Births as [storage, bytes], deaths as [storage]."""
    before = [event.num_bytes for event in golden.trace.events if event.step == 0]
    steps: list[list[list[int]]] = [[] for _ in range(NUM_KEPT)]
    for event in golden.trace.events:
        if event.step:
            steps[event.step - 1].append(
                [event.storage, *([event.num_bytes] if event.num_bytes > 0 else [])]
            )
    content = {
        "kind": "step" if isinstance(golden.case, StepCase) else "loop",
        "case": asdict(golden.case),
        "card": golden.card,
        "versions": golden.versions,
        "peaks": golden.peaks,
        "before": before,
        "steps": steps,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _trace(content: dict[str, Any]) -> MemoryTrace:
    sizes: dict[int, int] = dict(enumerate(content["before"]))
    events = [MemoryEvent(storage, size, "temporary", "load") for storage, size in sizes.items()]
    for number, step in enumerate(content["steps"], start=1):
        for storage, *born in step:
            size = sizes.setdefault(storage, *born) if born else -sizes[storage]
            events.append(MemoryEvent(storage, size, "temporary", "forward", step=number))
    return MemoryTrace(tuple(events))


def _tuples(value: Any) -> Any:
    """As they were before JSON made lists of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def renumbered(events: Sequence[MemoryEvent]) -> MemoryTrace:
    """The same, with storages numbered in the order of their births, from 0."""
    numbers: dict[int, int] = {}
    made = []
    for event in events:
        storage = numbers.setdefault(event.storage, len(numbers))
        made.append(MemoryEvent(storage, event.num_bytes, "temporary", "forward", step=event.step))
    return MemoryTrace(tuple(made))


def last_steps(trace: MemoryTrace, number: int = NUM_KEPT) -> MemoryTrace:
    """As steps 1, 2, ...; what lived when they began was born in step 0."""
    first = max(event.step for event in trace.events) - number + 1
    alive: dict[int, MemoryEvent] = {}
    inside = []
    for event in trace.events:
        if event.step >= first:
            inside.append(event)
        elif event.num_bytes > 0:
            alive[event.storage] = event
        elif event.num_bytes < 0:
            alive.pop(event.storage, None)
    moved = [_moved(event, 0) for event in alive.values()]
    return MemoryTrace((*moved, *(_moved(event, event.step - first + 1) for event in inside)))


def _moved(event: MemoryEvent, step: int) -> MemoryEvent:
    return MemoryEvent(
        event.storage,
        event.num_bytes,
        event.category,
        event.phase,
        step=step,
        module=event.module,
        op=event.op,
    )


def record(golden: Golden) -> MemoryTrace:
    """The same steps as fitune records them, without a card, for the kernels of the torch that the file names."""
    major, minor, *_ = golden.versions["torch"].split(".")
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(cuda_target, "_installed_torch", lambda: (int(major), int(minor))),
    ):
        gpu, steps = CATALOGUE[golden.card], num_steps(golden.case)
        return last_steps(recorded_case(golden.case, gpu, Path(directory), num_steps=steps))


def peaks(trace: MemoryTrace) -> tuple[int, ...]:
    """Requested bytes of each step."""
    alive = 0
    most: dict[int, int] = {}
    for event in trace.events:
        before, alive = alive, alive + event.num_bytes
        most[event.step] = max(most.get(event.step, before), alive)
    return tuple(most[step] for step in range(1, NUM_KEPT + 1))


def show_state(path: Path) -> None:
    golden = read_golden(path)
    recorded = record(golden)
    difference = first_difference(recorded, golden.trace)
    peak = "equal peaks" if peaks(recorded) == golden.peaks else "peaks differ"
    print(f"{path.name.removesuffix(SUFFIX)}: {peak}; {difference or 'equal events'}", flush=True)


# ---- in the process that measures -----------------------------------------------------------------------------------


def make_golden(case: StepCase | LoopCase, card: str) -> Golden:
    """In a process that has not used the card before."""
    import torch

    from rehearsal import compare, steps
    from rehearsal.predicted import config_of

    torch.cuda.init()
    if isinstance(case, StepCase):
        with tempfile.TemporaryDirectory() as directory:
            history = steps.measure(case, config_of(case, Path(directory)), keep=NUM_KEPT)
    else:
        history = compare.measure_loop(case, num_steps=NUM_LOOP_STEPS, keep=NUM_KEPT)
    peaks = tuple(peaks.requested_bytes for peaks in history.peaks[-NUM_KEPT:])
    versions = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
    }
    return Golden(case, card, versions, peaks, renumbered(history.events))


def _make_apart(case: StepCase | LoopCase, card: str, path: Path) -> bool:
    """In a forked child; whether it was made."""
    import torch

    child = os.fork()
    if child == 0:
        torch.cuda._is_in_bad_fork = lambda: False  # see compare_apart
        try:
            write_golden(make_golden(case, card), path)
        except Exception as error:
            print(f"{path.name}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def _of_card(card: str, names: Sequence[str]) -> int:
    """In a process of its own, since PyTorch remembers the properties of the first card that it asks for: exit code."""
    if not names:
        return 0
    command = [sys.executable, "-m", "rehearsal.golden", "--cases", ",".join(names)]
    return subprocess.run(command, env=os.environ | {"FAKE_CARD": card}, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default="", help="only these files (case-card), separated by commas"
    )
    parser.add_argument(
        "--state",
        action="store_true",
        help="compare with recordings; needs no card, writes nothing",
    )
    options = parser.parse_args()
    names = [word for word in options.cases.split(",") if word]
    files = {f"{case.name}-{card}": (case, card) for case, card in golden_cases()}
    if unknown := sorted({*names} - {*files}):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(files)}")
    wanted = names or [*files]
    if options.state:
        warnings.simplefilter("ignore")
        for name in wanted:
            show_state(DIRECTORY / f"{name}{SUFFIX}")
        return
    if "FAKE_CARD" not in os.environ:
        sys.exit("the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.golden")
    if {files[name][1] for name in wanted} != {os.environ["FAKE_CARD"]}:
        ended = [
            _of_card(card, [name for name in wanted if files[name][1] == card]) for card in CARDS
        ]
        sys.exit(max(ended))
    import transformers

    import rehearsal.compare  # noqa: F401 (once for all children)

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    failed = [
        name for name in wanted if not _make_apart(*files[name], DIRECTORY / f"{name}{SUFFIX}")
    ]
    print(
        f"{os.environ['FAKE_CARD']}: {len(wanted) - len(failed)} of {len(wanted)} files written",
        flush=True,
    )
    if failed:
        sys.exit(f"not made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
