"""What fitune records of one operator at a time, beside what PyTorch's own operator allocates on the card.

    python -m rehearsal.operators                 the table of this card: how many cases agree, operator by operator
    python -m rehearsal.operators --show 5        and the first differences of each operator
    python -m rehearsal.operators --only sum,attention
    python -m rehearsal.operators --golden FILE   adds what PyTorch did on this card, in a few cases of each operator,
                                                  for the tests that run without a card

A case agrees where allocations and frees are the same, of the same bytes and in the same order.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.record import RecordSettings, record_loop
from rehearsal.operator_cases import CASES, Case

Events = list[int]
"""Bytes of an allocation; minus n where the n-th allocation, counted from 1, is freed."""


def genuine(cases: Sequence[Case]) -> list[Events | str]:
    """What each case's second call allocates and frees on the card; the first one makes what stays. A sentence where
    the card has no such kernel."""
    return [_or_sentence(partial(_genuine, case)) for case in cases]


def _genuine(case: Case) -> Events:
    step = case.prepare(torch.device("cuda", 0))
    step()
    torch.cuda.memory._record_memory_history(stacks="python", context=None)
    step()
    time.sleep(0.005)  # autograd's thread drops its own references behind the call
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    return _in_order(
        (entry["addr"], entry["size"] if entry["action"] == "alloc" else -1)
        for entry in trace
        if entry["action"] in ("alloc", "free_requested")
    )


def recorded(cases: Sequence[Case], target: CudaTarget) -> list[Events | str]:
    """What fitune records of them."""
    return [
        each
        for start in range(0, len(cases), 50)
        for each in _recorded(cases[start : start + 50], target)
    ]


def _recorded(cases: Sequence[Case], target: CudaTarget) -> list[Events | str]:
    """One recording, in which every other step is a case's second call."""
    failed: dict[int, str] = {}

    def loop(_: torch.nn.Module, device: torch.device) -> Callable[[], None]:
        turns = iter(range(2 * len(cases)))
        steps: list[Callable[[], object]] = []

        def step() -> None:
            number, is_second = divmod(next(turns), 2)
            try:
                if is_second:
                    steps.pop()()
                else:
                    made = cases[number].prepare(device)
                    made()
                    steps.append(made)
            except Exception as error:
                failed.setdefault(number, _sentence(error))

        return step

    trace = record_loop(
        torch.nn.Module, loop, RecordSettings(target=target, num_steps=2 * len(cases))
    )
    events: list[list[tuple[int, int]]] = [[] for _ in cases]
    for event in trace.events:
        if event.step and event.step % 2 == 0:
            events[event.step // 2 - 1].append((event.storage, event.num_bytes))
    return [failed.get(number) or _in_order(each) for number, each in enumerate(events)]


def _or_sentence(run: Callable[[], Events]) -> Events | str:
    try:
        return run()
    except Exception as error:
        return _sentence(error)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _in_order(events: Iterable[tuple[int, int]]) -> Events:
    numbers: dict[int, int] = {}
    result: Events = []
    for key, num_bytes in events:
        if num_bytes > 0:
            result.append(num_bytes)
            numbers[key] = sum(each > 0 for each in result)
        elif key in numbers:
            result.append(-numbers.pop(key))
    return [
        each for _, run in groupby(result, lambda each: each > 0) for each in _settled(list(run))
    ]


def _settled(run: Events) -> Events:
    """Frees one after the other leave the same memory in any order."""
    return run if run[0] > 0 else sorted(run, reverse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="operators, separated by commas")
    parser.add_argument(
        "--show", type=int, default=0, help="how many differences of each operator to print"
    )
    parser.add_argument("--golden", type=Path, help="where to write what PyTorch did")
    options = parser.parse_args(arguments)
    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    target = card_target(properties)
    wanted = options.only.split(",") if options.only else None
    cases = [case for case in CASES if wanted is None or case.operator in wanted]
    counts: dict[str, list[int]] = {}
    golden: dict[str, list[tuple[str, Events]]] = {}
    for case, done, predicted in zip(cases, genuine(cases), recorded(cases, target), strict=True):
        count = counts.setdefault(case.operator, [0, 0])
        if isinstance(done, str):
            if options.show:
                print(f"  {case.name}: not on this card: {done}")
            continue
        count[1] += 1
        if done == predicted:
            count[0] += 1
            golden.setdefault(case.operator, []).append((case.name, done))
        elif count[1] - count[0] <= options.show:
            print(f"  {case.name}\n    PyTorch  {done}\n    fitune   {predicted}")
    print(f"{properties.name}, torch {torch.__version__}")
    for operator, (agree, total) in counts.items():
        print(f"{operator:32} {agree:4} of {total:4} agree")
    print(
        f"{'all':32} {sum(a for a, _ in counts.values()):4} of {sum(n for _, n in counts.values()):4} agree"
    )
    if options.golden:
        _add_golden(options.golden, properties, golden)


def _add_golden(
    path: Path, properties: Any, agreeing: Mapping[str, Sequence[tuple[str, Events]]]
) -> None:
    """Of each operator a few cases, from the first to the last."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[properties.name] = {
        "torch": [int(each) for each in torch.__version__.split(".")[:2]],
        "compute_capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "cases": {
            name: events
            for operator, cases in agreeing.items()
            for name, events in _spread(cases, 12 if operator == "attention" else 2)
        },
    }
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(known.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _spread(cases: Sequence[tuple[str, Events]], number: int) -> list[tuple[str, Events]]:
    longest_first = sorted(cases, key=lambda case: len(case[1]), reverse=True)
    return [longest_first[i * len(cases) // number] for i in range(min(number, len(cases)))]


def card_target(properties: Any) -> CudaTarget:
    """As fitune would plan for this card."""
    return CudaTarget(
        (properties.major, properties.minor), "auto", properties.name, properties.total_memory,
        properties.multi_processor_count,
    )  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
