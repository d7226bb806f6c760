"""Counts what a step asks of the card, for each loop of `rehearsal.launches.loops`, and writes the section of
docs/rehearsal.md and the short table of docs/speed.md.

    python -m rehearsal.run python -m rehearsal.launches.count
    python -m rehearsal.run python -m rehearsal.launches.count --loops "fitune;Trainer"
    python -m rehearsal.run python -m rehearsal.launches.count --loops fitune --operators   which operators launch

Each loop runs in a forked child: two steps, then the ones that are counted. docs/launches.json is written behind each
loop, so that what is done is kept.
"""

import argparse
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("FAKE_COPY_MAX", str(1 << 16))
os.environ.setdefault("FAKE_FILL", "0")

import torch
import transformers

from rehearsal.launches.counters import OPERATIONS, SYNCHRONISATIONS, per_step, read_counters
from rehearsal.launches.loops import LOOPS, MODELS, Done, rows
from rehearsal.rows import ROOT, replace_section
from rehearsal.run import LIBRARIES

RESULTS = ROOT / "docs" / "launches.json"
PAGE = ROOT / "docs" / "rehearsal.md"
SPEED_PAGES = (ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.zh.md")
BEGIN, END = "<!-- rehearsal.launches: begin -->", "<!-- rehearsal.launches: end -->"
NUM_WARM, NUM_COUNTED = 2, 5
MOST_SECONDS = 900.0
"""Of a loop."""
MOST_NAMED = 25
"""Operators that are printed."""


def count(loop: Callable[[Callable[[], None]], None]) -> dict[str, float]:
    """Of a step, on average."""
    steps: list[dict[str, int]] = []

    def ended() -> None:
        steps.append(read_counters())
        if len(steps) == NUM_WARM + NUM_COUNTED:
            raise Done

    try:
        loop(ended)
    except Done:
        pass
    else:
        raise RuntimeError(f"the loop ended after {len(steps)} steps")
    return per_step(steps[NUM_WARM - 1], steps[-1], NUM_COUNTED)


def name_operators(loop: Callable[[Callable[[], None]], None], path: Path) -> dict[str, Any]:
    """Of one step, behind the warm ones: writes to `path` as `operators_end` says, and tells where."""
    observer = ctypes.CDLL(str(LIBRARIES / "liboperators.so"))
    stack: list[str] = []

    def enter(module: torch.nn.Module, *_: Any) -> None:
        if (
            torch.compiler.is_compiling()
        ):  # a hook that is traced would part what is compiled as one
            return
        stack.append(type(module).__name__)
        observer.operators_enter(stack[-1].encode())

    def leave(*_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack.pop()
        observer.operators_enter((stack[-1] if stack else "").encode())

    torch.nn.modules.module.register_module_forward_pre_hook(enter)
    torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
    steps = 0

    def ended() -> None:
        nonlocal steps
        steps += 1
        if steps == NUM_WARM:
            observer.operators_begin()
        elif steps == NUM_WARM + 1:
            observer.operators_end(str(path).encode())
            raise Done

    with suppress(Done):
        loop(ended)
    return {"path": str(path)}


def show_operators(path: Path) -> None:
    by_operator: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        number, kind, module, _, innermost = line.split("\t")
        by_operator[f"{kind}: {innermost} in {module}"] += int(number)
    print(f"{by_operator.total()} launches, copies and waits")
    for what, times in by_operator.most_common(MOST_NAMED):
        print(f"{times:7,} {times / by_operator.total():6.1%}  {what}")


def apart(task: Callable[[], Mapping[str, Any]], *, limit: float = MOST_SECONDS) -> dict[str, Any]:
    """In a forked child, which tells by a pipe. limit: seconds after which the child is ended."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        torch.cuda._is_in_bad_fork = lambda: False  # see compare.compare_apart
        try:
            told: Any = task()
        except Exception as error:
            told = {"failure": f"{type(error).__name__}: {error}"[:300]}
        with os.fdopen(writes, "w") as pipe:
            pipe.write(json.dumps(told))
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        if select.select([pipe], [], [], limit)[0]:
            text = pipe.read()
        else:
            os.kill(child, signal.SIGKILL)
            text = json.dumps({"failure": f"not done in {limit:,.0f} s"})
    os.waitpid(child, 0)
    told = json.loads(text) if text else {"failure": "the process ended"}
    assert isinstance(told, dict)
    return told


def section(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """results: by model and loop."""
    lines = [
        f"One optimizer step on {len(rows())} samples, {sum(map(len, rows())):,} tokens, the longest of "
        f"{max(map(len, rows()))}; averages of {NUM_COUNTED} steps. A call of cuBLAS counts as one.",
    ]
    for model in (name for name in MODELS if name in results):
        lines += ["", f"### {model}", "", *_table(results[model])]
    return lines


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    tokens = sum(map(len, rows()))
    lines = [
        "| loop | kernels | matrix products | other calls | Triton | memsets, copies on the card | all "
        "| of 1,000 tokens | host waits | copies to the card | to the host | cudaMalloc |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in LOOPS if name in results):
        counted = results[name]
        if "failure" in counted:
            lines.append(f"| {name} | not counted: {counted['failure']} |" + " |" * 10)
            continue
        operations = sum(counted[each] for each in OPERATIONS)
        values = [
            *(
                counted[each]
                for each in ("kernels", "matrix_products", "library_calls", "triton_kernels")
            ),
            counted["memsets"] + counted["copies_on_card"],
            operations,
            operations / tokens * 1000,
            sum(counted[each] for each in SYNCHRONISATIONS),
            *(counted[each] for each in ("copies_to_card", "copies_to_host", "mallocs")),
        ]
        lines.append(f"| {name} | {' | '.join(f'{value:,.0f}' for value in values)} |")
    return lines


def summary(results: dict[str, dict[str, dict[str, Any]]], *, chinese: bool) -> list[str]:
    """Operations and waits of each loop for each model; a dash where a loop was not counted."""
    models = [name for name in MODELS if name in results]
    head = ("循环", "主机等待") if chinese else ("loop", "host waits")
    lines = [
        f"| {head[0]} | {' | '.join(models)} | {head[1]} |",
        "|---|" + "---:|" * (len(models) + 1),
    ]
    for loop in (name for name in LOOPS if any(name in results[model] for model in models)):
        counted = [results[model].get(loop, {"failure": ""}) for model in models]
        operations = [
            "-" if "failure" in each else f"{sum(each[name] for name in OPERATIONS):,.0f}"
            for each in counted
        ]
        waits = {
            sum(each[name] for name in SYNCHRONISATIONS)
            for each in counted
            if "failure" not in each
        }
        told = (
            "-"
            if not waits
            else f"{min(waits):,.0f}"
            if len(waits) == 1
            else f"{min(waits):,.0f}-{max(waits):,.0f}"
        )
        lines.append(f"| {loop} | {' | '.join(operations)} | {told} |")
    return lines


def write(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_section(PAGE, BEGIN, END, section(results))
    for page in SPEED_PAGES:
        if page.exists() and BEGIN in page.read_text():
            replace_section(
                page, BEGIN, END, summary(results, chinese=page.name.endswith(".zh.md"))
            )


def chosen(parser: argparse.ArgumentParser, text: str, known: list[str]) -> list[str]:
    """All, where none is named."""
    wanted = [word.strip() for word in text.split(";") if word.strip()]
    if unknown := sorted({*wanted} - {*known}):
        parser.error(f"unknown: {'; '.join(unknown)}; there are {'; '.join(known)}")
    return wanted or known


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loops", default="", help="only these, separated by semicolons")
    parser.add_argument("--models", default="", help="only these, separated by semicolons")
    parser.add_argument(
        "--operators",
        action="store_true",
        help="name the operators that launch; nothing is written",
    )
    options = parser.parse_args()
    models, loops = (
        chosen(parser, options.models, [*MODELS]),
        chosen(parser, options.loops, [*LOOPS]),
    )
    if "FAKE_CARD" not in os.environ:
        sys.exit(
            "the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.launches.count"
        )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    import trl  # noqa: F401 (once for all children)

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model, name in product(models, loops):
        loop = partial(LOOPS[name], MODELS[model])
        if options.operators:
            with tempfile.NamedTemporaryFile() as file:
                path = Path(file.name)
                print(model, name, apart(partial(name_operators, loop, path)).get("failure", ""))
                show_operators(path)
            continue
        counted = results.setdefault(model, {})[name] = apart(partial(count, loop))
        told = counted.get("failure") or f"{sum(counted[each] for each in OPERATIONS):,.0f}"
        print(f"{model}, {name}: {told}", flush=True)
        write(results)


if __name__ == "__main__":
    main()
