"""What `fitune board` costs: the browser's script time, the memory of page and server, and the run beside it.

python benchmarks/board.py                  results/board.json and the table of docs/board.md, in about ten minutes
python benchmarks/board.py --runs 5 --steps 2000

Fifty runs of 100,000 steps are written, of which one goes on and gains a step a second. A headless Chromium shows the run
that goes on alone, then all of them laid over each other. The time of scripts is that of
the page's own handlers, that of tasks Chromium's counter (with style, layout and painting), both of an update; memory is the
heap of scripts and the private memory of the page's process; the server's memory is its
resident set at its highest. For the cost beside a run, a loop of matrix products and the server are bound to one core, in
turns of two seconds with the page followed and not.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("src", "tests", "tests/board")]

from browser import Browser, browser  # noqa: E402

from fitune.run.directory import RunDirectory, create_run, working_on  # noqa: E402
from fitune.run.eval_rows import EvalRows, append_eval_rows  # noqa: E402
from fitune.run.files import write_json  # noqa: E402
from fitune.run.metrics import EvalMetrics, Summary, append_line, as_line, summary_json  # noqa: E402
from watched_run import sample, step_metrics  # noqa: E402

RESULT = Path(__file__).parent / "results" / "board.json"
#: a page of the documentation -> the words of its table
DOCS = {
    ROOT / "docs" / "board.md": (
        "runs of {steps:,} steps shown", "processor time of an update, ms", "an update every, s",
        "heap of scripts, MB", "page's process, MB", "until it stands, s",
    ),
    ROOT / "docs" / "board.zh.md": (
        "显示的运行（每个 {steps:,} 步）", "每次更新的处理器时间，毫秒", "更新间隔，秒",
        "脚本堆，MB", "页面进程，MB", "首次显示，秒",
    ),
}  # fmt: skip
MARK = "<!-- benchmarks/board.py -->"
NUM_EVALS, NUM_ROWS, NUM_SAMPLES = 20, 200, 7_200
#: The runs have curves of this many kinds; the others are links to their files.
NUM_KINDS = 5
MATRIX = 400


def write_runs(output: Path, *, num_runs: int, num_steps: int) -> RunDirectory:
    """Write the runs, and return the one that goes on."""
    firsts: list[RunDirectory] = []
    for index in range(num_runs):
        run = create_run(output, f"run-{index:02}")
        if index < NUM_KINDS:
            firsts.append(run)
            write_curves(run, seed=index, num_steps=num_steps)
        else:
            for name in ("metrics", "eval_rows", "memory"):
                os.link(getattr(firsts[index % NUM_KINDS], name), getattr(run, name))
        status = "running" if index == 0 else "finished"
        summary = Summary(
            status=status,
            steps=num_steps,
            seconds=1.25 * num_steps,
            data_hash="d",
            effective_batch=24,
        )
        write_json(run.summary, summary_json(summary))
        write_json(run.plan, {"budget_bytes": 20 * 2**30})
    # links to a file that grows would grow too
    for file in (firsts[0].metrics, firsts[0].memory):
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
    return firsts[0]


def write_curves(run: RunDirectory, *, seed: int, num_steps: int) -> None:
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal(num_steps)
    losses = 2 + np.exp(-3 * np.arange(num_steps) / num_steps) + 0.1 * noise + 0.02 * seed
    with run.metrics.open("wb") as file:
        for step in range(1, num_steps + 1):
            file.write(
                as_line(
                    replace(
                        step_metrics(step),
                        loss=float(losses[step - 1]),
                        grad_norm=0.5 + abs(float(noise[step - 1])),
                    )
                )
            )
    weights = tuple(float(1 + index % 7) for index in range(NUM_ROWS))
    hard = draw.standard_normal(NUM_ROWS) * 0.05 + np.random.default_rng(99).standard_normal(
        NUM_ROWS
    )
    for number in range(NUM_EVALS + 1):
        step = number * num_steps // NUM_EVALS
        rows = 3 + hard - number / NUM_EVALS + 0.02 * seed
        tokens, loss = 48_000 * step, float(np.average(rows, weights=weights))
        append_line(
            run.metrics,
            EvalMetrics(
                step=step, total_tokens=tokens, eval_loss=loss, eval_tokens=1000, seconds=9.0
            ),
        )
        append_eval_rows(
            run.eval_rows,
            EvalRows(
                step=step, total_tokens=tokens, losses=tuple(map(float, rows)), weights=weights
            ),
        )
    with run.memory.open("wb") as file:
        for second in range(NUM_SAMPLES):
            file.write(as_line(sample(second / 2), leave_out_unknown=True))


@contextmanager
def served(runs: Path) -> Iterator[tuple[str, psutil.Process]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "FITUNE_LANG": "en"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fitune", "board", str(runs), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def growing(run: RunDirectory, num_steps: int) -> Iterator[None]:
    """Append a step to the run each second, as a run that goes on does."""
    over = threading.Event()

    def write() -> None:
        step = num_steps
        while not over.wait(1.0):
            step += 1
            append_line(run.metrics, step_metrics(step))
            append_line(run.memory, sample(step / 2), leave_out_unknown=True)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def counters(tab: Browser) -> dict[str, float]:
    return {each["name"]: each["value"] for each in tab.call("Performance.getMetrics")["metrics"]}


def page_process() -> psutil.Process:
    """The process of the page: of Chromium's renderers the largest."""
    found = [
        each
        for each in psutil.Process().children(recursive=True)
        if "--type=renderer" in each.cmdline()
    ]
    return max(found, key=lambda each: each.memory_full_info().uss)


def measure_page(tab: Browser, url: str, *, num_shown: int, seconds: float) -> dict[str, object]:
    """Show runs, wait until their page stands, and measure its updates while the run goes on."""
    tab.open("about:blank")
    start = time.monotonic()
    tab.open(url)
    tab.wait("typeof fitune === 'object'")
    names = "%0A".join(f"run-{index:02}" for index in range(num_shown))
    tab.run(f"location.hash = '#/runs/{names}'")
    tab.wait(
        "[...document.querySelectorAll('.plot')].filter((plot) => plot.dataset.drawn).length >= 4",
        900,
    )
    first_seconds = time.monotonic() - start
    time.sleep(3)
    tab.run("fitune.charts.busy.length = 0")
    tab.run("fitune.runs.updates = 0")
    before = counters(tab)
    time.sleep(seconds)
    after, updates = counters(tab), int(tab.run("fitune.runs.updates"))
    busy = [float(value) for value in tab.run("fitune.charts.busy")]
    return {
        "runs": num_shown,
        "first_seconds": round(first_seconds, 1),
        "updates": updates,
        "seconds_between": round(seconds / max(updates, 1), 1),
        "script_ms_per_update": round(sum(busy) / max(updates, 1), 1),
        "task_ms_per_update": round(
            1000 * (after["TaskDuration"] - before["TaskDuration"]) / max(updates, 1), 1
        ),
        "longest_task_ms": round(max(busy, default=0.0), 1),
        "heap_mb": round(after["JSHeapUsedSize"] / 1e6, 1),
        "page_process_mb": round(page_process().memory_full_info().uss / 1e6, 1),
    }


def measure_beside(
    url: str, server: psutil.Process, *, turns: int, seconds: float
) -> dict[str, object]:
    """Compare a loop of matrix products with the run followed and not, both on one core.

    The server is stopped in the turns without it; what falls due in them is done in those with it,
    which makes them cost more than they would.
    """
    address, _, token = url.partition("/#token=")
    everywhere = os.sched_getaffinity(0)
    core = max(everywhere)
    request = Request(f"{address}/api/runs/follow?run=run-00", headers={"X-Fitune-Token": token})
    one = np.random.default_rng(0).random((MATRIX, MATRIX))

    def speed() -> float:
        """Return the products done in a second of wall time."""
        start, done = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            one @ one
            done += 1
        return done / (time.monotonic() - start)

    def used_seconds() -> float:
        return float(sum(server.cpu_times()[:2]))

    with urlopen(request) as answer:

        def read() -> None:
            # the stream ends where the server does
            with suppress(OSError, AttributeError, ValueError):
                while answer.read1():
                    pass

        threading.Thread(target=read, daemon=True).start()
        time.sleep(15)  # the whole page has come
        start, used = time.monotonic(), used_seconds()
        time.sleep(turns * seconds)
        fraction = (used_seconds() - used) / (time.monotonic() - start)
        os.sched_setaffinity(0, {core})
        server.cpu_affinity([core])
        with_it, without = [], []
        for _ in range(turns):
            server.suspend()
            without.append(speed())
            server.resume()
            with_it.append(speed())
        os.sched_setaffinity(0, everywhere)
    changes = np.array(with_it) / np.array(without) - 1
    return {
        "turns": turns,
        "server_core_fraction": round(fraction, 5),
        "speed_change_median": round(float(np.median(changes)), 5),
        "speed_change_quartiles": [
            round(float(each), 5) for each in np.quantile(changes, (0.25, 0.75))
        ],
    }


def write_tables(found: dict[str, Any]) -> None:
    """Write the pages' table between the two marks of each page of the documentation."""
    for path, heads in DOCS.items():
        rows = [
            [each["runs"], each["task_ms_per_update"], each["seconds_between"], each["heap_mb"],
             each["page_process_mb"], each["first_seconds"]]
            for each in found["pages"]
        ]  # fmt: skip
        lines = [
            [head.format(steps=found["steps"]) for head in heads],
            ["---:"] * len(heads),
            *rows,
        ]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        before, _, after = path.read_text(encoding="utf-8").split(MARK)
        path.write_text(f"{before}{MARK}\n\n{table}\n\n{MARK}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="how long each page is followed"
    )
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    found: dict[str, object] = {"runs": arguments.runs, "steps": arguments.steps}
    with TemporaryDirectory() as place:
        live = write_runs(Path(place), num_runs=arguments.runs, num_steps=arguments.steps)
        print("written", flush=True)
        with working_on(live), growing(live, arguments.steps), served(Path(place)) as (url, server):
            empty = server.memory_info().rss
            pages = []
            for num_shown in sorted({1, arguments.runs}):
                with browser() as tab:
                    tab.call("Performance.enable", timeDomain="threadTicks")
                    tab.size(1280, 900)
                    pages.append(
                        measure_page(tab, url, num_shown=num_shown, seconds=arguments.seconds)
                    )
                    assert tab.errors == [], tab.errors
                print(pages[-1], flush=True)
            found["pages"] = pages
            found["server_empty_mb"] = round(empty / 1e6, 1)
            found["beside"] = measure_beside(url, server, turns=arguments.turns, seconds=2.0)
            print(found["beside"], flush=True)
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            found["server_peak_mb"] = round(int(peak.split()[1]) * 1024 / 1e6, 1)
            print(found["server_peak_mb"], flush=True)
    if (arguments.runs, arguments.steps) == (50, 100_000):
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    write_tables(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
