"""fitune's step against TRL's SFTTrainer and against padding every row to max_length: tokens/s, peak memory, losses.

python benchmarks/speed.py                                              everything, about half an hour on one core
python benchmarks/speed.py --model minimind2-small --max-length 768     one comparison: 2 to 8 minutes
python benchmarks/speed.py --trainer fitune --trainer "TRL, packing"    these trainers only
python benchmarks/speed.py --table                                      only writes the table again

Each trainer runs in a process of its own, one after another and then all again (A, B, A, B), so that what else the
machine does meets them alike. Results are kept in benchmarks/results/speed.json, one entry for each comparison, and the
tables in docs/speed.md and docs/speed.zh.md are written from them. TRL's rows need `pip install trl`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speed_trainers import TRAINERS, Outcome, Task, dialogue_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"
PAGES = tuple(HERE.parent / "docs" / name for name in ("speed.md", "speed.zh.md"))
BEGIN, END = "<!-- written by benchmarks/speed.py -->", "<!-- end -->"

TASKS = (
    Task(model="minimind2-small", max_length=768),
    Task(model="minimind2-small", max_length=2048),
    Task(model="SmolLM2-135M", max_length=768, rows_per_step=4),
    Task(model="SmolLM2-135M", max_length=2048, rows_per_step=4, padded_rows=2),
    Task(model="SmolLM2-135M", max_length=768, method="lora", rows_per_step=4),
    Task(model="SmolLM2-135M", max_length=2048, method="lora", rows_per_step=4, padded_rows=1),
)
MOST_SECONDS = 1800


def compare(
    task: Task, trainers: Sequence[str], *, rounds: int
) -> Iterator[dict[str, list[Outcome]]]:
    """After each process the outcomes so far of each trainer, one for each round. A trainer that fails is left out, and
    stderr says why."""
    outcomes: dict[str, list[Outcome]] = {}
    for number in range(rounds):
        for name in trainers:
            outcome = run_apart(task, name)
            if outcome is not None:
                outcomes.setdefault(name, []).append(outcome)
                said = f"{speed(outcome):.0f} tokens/CPU s, {outcome.peak_bytes / 1e6:,.0f} MB"
                print(
                    f"{title(task)} round {number + 1} {name}: {said}", file=sys.stderr, flush=True
                )
                yield outcomes


def run_apart(task: Task, trainer: str) -> Outcome | None:
    """In a process of its own, with as many threads as the task says."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        json.dumps({"task": asdict(task), "trainer": trainer}),
    ]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{trainer}: no answer within {MOST_SECONDS} s", file=sys.stderr)
        return None
    if process.returncode:
        print(
            f"{trainer}: failed: {(process.stderr.strip().splitlines() or ['killed'])[-1]}",
            file=sys.stderr,
        )
        return None
    return Outcome(**json.loads(process.stdout.splitlines()[-1]))


def work(task: Task, trainer: str) -> Outcome:
    import torch

    torch.set_num_threads(task.threads)
    return TRAINERS[trainer](task, dialogue_rows(task))


def title(task: Task) -> str:
    return (
        f"{task.model}{', LoRA' if task.method == 'lora' else ''}, max_length {task.max_length:,}"
    )


def speed(outcome: Outcome) -> float:
    """Real tokens in a CPU second."""
    return outcome.tokens / outcome.cpu_seconds


# ---- the table ------------------------------------------------------------------------------------------------------


def entry(task: Task, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    return {
        "task": asdict(task),
        "outcomes": {name: [asdict(each) for each in found] for name, found in outcomes.items()},
    }


def render(entries: Sequence[dict[str, Any]]) -> str:
    """One table for each comparison. Speed is the best round's, as what disturbs only slows; memory is the largest."""
    lines = [BEGIN, ""]
    for each in entries:
        task = Task(**each["task"])
        outcomes = {
            name: [Outcome(**one) for one in found] for name, found in each["outcomes"].items()
        }
        lines += [
            f"**{title(task)}**: {task.num_steps} steps of {task.rows_per_step} samples, "
            f"{next(iter(outcomes.values()))[0].tokens:,} real tokens, {task.threads} thread, best of "
            f"{max(map(len, outcomes.values()))} rounds"
            + (
                f"; padding with {task.padded_rows} samples at a time, as many as fit"
                if task.padded_rows
                else ""
            ),
            "",
            "| trainer | tokens / CPU s | tokens / s | peak above the model, MB | loss of the last step | "
            "fitune's speed | fitune's peak |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_line(name, found, outcomes.get("fitune")) for name, found in outcomes.items()),
            "",
        ]
    return "\n".join([*lines, END])


def _line(name: str, outcomes: Sequence[Outcome], ours: Sequence[Outcome] | None) -> str:
    fastest = max(map(speed, outcomes))
    wall = max(each.tokens / each.wall_seconds for each in outcomes)
    peak_bytes = max(each.peak_bytes for each in outcomes)
    ratios = ("n/a", "n/a")
    if ours is not None:
        ratios = (
            f"x {max(map(speed, ours)) / fastest:.2f}",
            f"{max(each.peak_bytes for each in ours) / peak_bytes:.0%}",
        )
    return (
        f"| {name} | {fastest:,.0f} | {wall:,.0f} | {peak_bytes / 1e6:,.0f} | {outcomes[0].losses[-1]:.5f} | "
        f"{ratios[0]} | {ratios[1]} |"
    )


def write_pages(entries: Sequence[dict[str, Any]]) -> None:
    """Replace the tables between the two marks in each page."""
    for page in PAGES:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + render(entries) + rest.split(END)[1], encoding="utf-8")


def read_entries() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def _place(task: Task | argparse.Namespace) -> tuple[str | None, int | None, str | None]:
    """What tells the tasks apart; None for what a command line leaves open."""
    return task.model, task.max_length, task.method


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted({task.model for task in TASKS}))
    parser.add_argument("--method", choices=sorted({task.method for task in TASKS}))
    parser.add_argument(
        "--max-length", type=int, choices=sorted({task.max_length for task in TASKS})
    )
    parser.add_argument("--trainer", action="append", choices=list(TRAINERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        given = json.loads(options.worker)
        print("\n" + json.dumps(asdict(work(Task(**given["task"]), given["trainer"]))))
        return
    entries = {_place(Task(**each["task"])): each for each in read_entries()}
    for task in () if options.table else TASKS:
        place = _place(task)
        if any(asked not in (None, own) for asked, own in zip(_place(options), place, strict=True)):
            continue
        before = entries[place]["outcomes"] if options.trainer and place in entries else {}
        for found in compare(task, options.trainer or list(TRAINERS), rounds=options.rounds):
            known = before | entry(task, found)["outcomes"]
            entries[place] = entry(task, {}) | {
                "outcomes": {name: known[name] for name in TRAINERS if name in known}
            }
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(list(entries.values()), indent=1) + "\n")
    write_pages(list(entries.values()))


if __name__ == "__main__":
    main()
