"""The directory of a run that trains on a card, as `fitune watch` finds it. Run as a program it writes the screens anew
that tests/screens/ keeps, for a person to look at: python tests/watched_run.py (with src and tests on the path)."""

import json
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fitune.cli.watch_screen import watch_screen
from fitune.run.directory import RunDirectory, create_run
from fitune.run.files import write_json
from fitune.run.follow import RunFollower, RunView
from fitune.run.memory import MemorySample
from fitune.run.metrics import (
    EvalMetrics,
    RunEvent,
    StepMetrics,
    Summary,
    append_line,
    as_json,
    summary_json,
)
from fitune.units import GIB, MIB

START = 1_795_500_000.0
NUM_STEPS = 400
TOTAL_STEPS = 2_000
STATE_BYTES = int(1.74 * GIB)
SCREENS = Path(__file__).parent / "screens"
SIZES = ((80, 24), (100, 30), (160, 50))
CARD = {
    "cards": [{"name": "NVIDIA GeForce RTX 4090", "total_bytes": 24164 * MIB}],
    "cpu": {"name": "AMD Ryzen 9 7950X"},
}
EVENTS = (
    (2, "memory_check", "memory of step 2: allocated 15.1 GiB predicted, 15.1 GiB measured (+0.1%)"),
    (113, "other_processes", "warning: other processes took 5.1 GiB more: they now hold 6.0 GiB"),
    (113, "micro_batch", "micro-batches shrink to at most 4,096 tokens with padding, with 2.5 GiB free; "
        "the effective batch stays"),
    (250, "micro_batch", "micro-batches grow to at most 8,192 tokens with padding, with 7.6 GiB free; the effective batch stays"),
    (333, "loss_spike", "warning: the loss of step 333 is 4.21, after a median of 2.12 in the 50 steps before: look at "
     "its samples, or lower optim.lr"),
)  # fmt: skip


def step_metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, tokens=48_000, supervised_tokens=31_000, total_tokens=48_000 * step,
        loss=1.9 + 2 * math.exp(-step / 90) + 0.05 * math.sin(step * 7), lr=3e-5, grad_norm=0.71, seconds=1.25,
        tokens_per_second=38_400.0, num_micro_batches=6, micro_batch=4, peak_allocated_bytes=int(15.05 * GIB),
        peak_reserved_bytes=int(15.9 * GIB),
    )  # fmt: skip


def sample(second: float, **changes: object) -> MemorySample:
    step = min(NUM_STEPS, int(second / 1.5))
    found = MemorySample(
        time=START + second, step=step, progress_fraction=step / TOTAL_STEPS, state_bytes=STATE_BYTES,
        allocated_bytes=STATE_BYTES + int(12 * GIB), peak_allocated_bytes=int(15.05 * GIB),
        reserved_bytes=int(14.6 * GIB), peak_reserved_bytes=int(15.9 * GIB), num_retries=0, num_ooms=0,
        process_bytes=3 * GIB, device_used_bytes=int(16 * GIB), device_total_bytes=24164 * MIB,
        other_processes_bytes=int(0.9 * GIB), spill_bytes=0, utilisation_fraction=0.97, power_watts=382.0,
        temperature_celsius=71.0, throttled="power limit", disk_free_bytes=512 * GIB,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def write_lines(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(as_json(record)) + "\n" for record in records))  # type: ignore[arg-type]


def write_watched_run(
    output: Path, *, status: str = "running", name: str = "minimind2-sft_2048-0007"
) -> RunDirectory:
    run = create_run(output, name)
    write_lines(run.metrics, [step_metrics(step) for step in range(1, NUM_STEPS + 1)])
    for step, loss in ((0, 3.95), (200, 2.187), (400, 2.041)):
        evaluation = EvalMetrics(
            step=step, total_tokens=48_000 * step, eval_loss=loss, eval_perplexity=math.exp(loss), eval_accuracy=0.5,
            eval_tokens=60_000, seconds=20.0,
        )  # fmt: skip
        append_line(run.metrics, evaluation)
    samples: list[object] = [sample(second / 2) for second in range(0, 1201, 4)]
    samples[85] = sample(170.0, other_processes_bytes=6 * GIB, device_used_bytes=int(21.1 * GIB))
    write_lines(run.memory, samples)
    happened = [
        RunEvent(time=START + step * 1.5, step=step, kind=kind, message=text)
        for step, kind, text in EVENTS
    ]
    write_lines(run.events, list(happened))
    write_json(run.env, CARD)
    write_json(run.plan, {"budget_bytes": int(20.4 * GIB)})
    summary = Summary(status=status, steps=NUM_STEPS, seconds=600.0)  # type: ignore[arg-type]
    write_json(run.summary, summary_json(summary))
    return run


def view_of(run: RunDirectory, state: str) -> RunView:
    """As read from the files, with the state that the lock would tell."""
    view = RunFollower(run).read()
    record = replace(view.record, state=state, updated=START + 600.0)  # type: ignore[arg-type]
    return replace(view, record=record)


def screens(output: Path) -> dict[str, str]:
    """By file name: each state in each size, and one in Chinese. The time zone must be UTC."""
    found = {}
    run = write_watched_run(output)
    for state in ("running", "crashed"):
        for width, height in SIZES:
            text = watch_screen(
                view_of(run, state), width=width, height=height - 1, now=START + 600.5
            )
            found[f"{state}_{width}x{height}.txt"] = text.plain + "\n"
    finished = watch_screen(view_of(run, "finished"), width=100, height=None, now=START + 9000)
    os.environ["FITUNE_LANG"] = "zh"
    chinese = watch_screen(view_of(run, "running"), width=80, height=23, now=START + 600.5)
    os.environ["FITUNE_LANG"] = "en"
    return found | {
        "finished.txt": finished.plain + "\n",
        "running_80x24_zh.txt": chinese.plain + "\n",
    }


if __name__ == "__main__":
    os.environ |= {"TZ": "UTC", "FITUNE_LANG": "en"}
    time.tzset()
    for file_name, content in screens(Path(tempfile.mkdtemp())).items():
        (SCREENS / file_name).write_text(content, encoding="utf-8")
