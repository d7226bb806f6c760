"""What a prediction takes from the start of its process on, in seconds and memory; and what further settings take.

python benchmarks/prediction_time.py            all models, about two minutes on a busy core
python benchmarks/prediction_time.py --only minimind2
python benchmarks/prediction_time.py --plans    the first `fitune plan` of four models instead, about two minutes

Each model has a process of its own. The weights are nowhere: an architecture is enough. All models together are written
to benchmarks/results/prediction_time.json and to the table of docs/memory.md; with --plans to
benchmarks/results/first_plan.json and to the table of docs/plan.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results" / "prediction_time.json"
PLAN_RESULTS = RESULTS.with_name("first_plan.json")
PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
PLAN_PAGE = PAGE.with_name("plan.md")
MARKS = "<!-- prediction_time.py: begin -->", "<!-- prediction_time.py: end -->"
PLAN_GPU = "RTX 4090"
IMPORTS = "import torch, transformers"
NUM_FURTHER = 30
GPU = "A100 80GB"
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
RUNS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], int]] = {
    "minimind2": (None, {"source": "minimind2"}, 6),
    "8B LoRA, recompute": (
        _LLAMA | _8B | {"num_hidden_layers": 32},
        {"method": "lora", "recompute": "full"},
        4,
    ),
    "70B QLoRA, recompute": (
        _LLAMA | _70B | {"num_hidden_layers": 80},
        {"method": "qlora", "recompute": "full"},
        2,
    ),
    "the same, 160 layers": (
        _LLAMA | _70B | {"num_hidden_layers": 160},
        {"method": "qlora", "recompute": "full"},
        2,
    ),
}
_QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "vocab_size": 151936,
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "num_hidden_layers": 24,
}  # fmt: skip
PLANS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "minimind2-small": (None, {"source": "minimind2-small"}),
    "minimind2": (None, {"source": "minimind2"}),
    "Qwen2.5-0.5B": (_QWEN, {}),
    "Llama-3.1-8B, LoRA": (_LLAMA | _8B | {"num_hidden_layers": 32}, {"method": "lora"}),
}


@dataclass(frozen=True, slots=True)
class PlanTaken:
    """CPU seconds of processes, user and system: of `import torch, transformers` alone, measured just before; of the
    plan until its first answer and until its table, imports included."""

    name: str
    import_seconds: float
    first_seconds: float
    table_seconds: float
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Taken:
    """wall_seconds and cpu_seconds: of the whole process, imports included. further_*: of NUM_FURTHER more sizes of
    micro-batch. resident_bytes: at most."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    import_cpu_seconds: float
    resident_bytes: int
    further_wall_seconds: float
    further_cpu_seconds: float
    allocated_bytes: int


def measure(name: str) -> Taken:
    architecture, model, rows = RUNS[name]
    with TemporaryDirectory() as directory:
        model = _with_architecture(model, architecture, Path(directory))
        return Taken(name=name, **_in_process({"model": model, "rows": rows}, {}))


def measure_plan(name: str) -> PlanTaken:
    before = _children_seconds()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    imports = _children_seconds() - before
    architecture, model = PLANS[name]
    with TemporaryDirectory() as directory, TemporaryDirectory() as cache:
        model = _with_architecture(model, architecture, Path(directory))
        found = _in_process({"model": model}, {"FITUNE_CACHE": cache})
    return PlanTaken(name=name, import_seconds=imports, **found)


def _with_architecture(
    model: dict[str, Any], architecture: dict[str, Any] | None, directory: Path
) -> dict[str, Any]:
    if architecture is None:
        return model
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config | architecture))
    return model | {"source": str(directory)}


def _in_process(task: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def work_plan(model: dict[str, Any]) -> dict[str, Any]:
    """The first plan as `fitune plan` makes it, in a fresh process with an empty cache."""
    from fitune.config import read_config
    from fitune.planning.search import choose_plan

    def seconds() -> float:
        return time.process_time() + _children_seconds()

    tree = {
        "model": model,
        "data": {"train": "none", "max_length": 2048},
        "batch": {"effective": 24},
    }
    first: list[float] = []
    plan = choose_plan(
        read_config(tree).config,
        gpu=PLAN_GPU,
        search="brief",
        on_first=lambda answer: first.append(seconds()),
    )
    return {
        "first_seconds": first[0],
        "table_seconds": seconds(),
        "num_candidates": len(plan.candidates),
    }


def work(model: dict[str, Any], rows: int) -> dict[str, Any]:
    """In a fresh process, whose time so far was the interpreter's own."""
    import resource

    started = time.time()
    import fitune

    _ = fitune.predict  # imports as a caller's first use does
    from fitune.config import read_config
    from fitune.machine.devices import find_device
    from fitune.planning.predict import predict_run
    from fitune.trace.library import Recordings

    imported = time.process_time()

    def config_of(num_rows: int) -> Any:
        batch = {"micro": num_rows, "effective": 2 * num_rows}
        tree = {
            "model": {"init": "random", **model},
            "data": {"train": "rows.jsonl", "max_length": 2048},
            "batch": batch,
        }
        return read_config(tree).config

    device, recordings = find_device(GPU), Recordings()
    prediction = predict_run(config_of(rows), device, recordings=recordings)
    wall, cpu = time.time() - started, time.process_time()
    sizes = [size for size in range(2, NUM_FURTHER + 3) if size != rows][:NUM_FURTHER]
    for size in sizes:
        predict_run(config_of(size), device, recordings=recordings)
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "import_cpu_seconds": imported,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "further_wall_seconds": time.time() - started - wall,
        "further_cpu_seconds": time.process_time() - cpu,
        "allocated_bytes": prediction.largest.peak_allocated_bytes,
    }


def table(taken: Sequence[Taken]) -> str:
    lines = [
        f"| model, rows of 2,048 tokens on an {GPU} | seconds | of them imports | resident GiB | "
        f"{NUM_FURTHER} further sizes |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name} | {each.cpu_seconds:.1f} | {each.import_cpu_seconds:.1f} | {each.resident_bytes / 2**30:.2f} | "
        f"{each.further_cpu_seconds:.1f} |"
        for each in taken
    ]
    return "\n".join(lines)


def plan_table(taken: Sequence[PlanTaken]) -> str:
    lines = [
        f"| model, 24 samples of 2,048 tokens on an {PLAN_GPU} | `{IMPORTS}` | first answer | whole table | "
        "settings looked at |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name} | {each.import_seconds:.1f} | {each.first_seconds:.1f} "
        f"({each.first_seconds / each.import_seconds:.1f} times) | {each.table_seconds:.1f} "
        f"({each.table_seconds / each.import_seconds:.1f} times) | {each.num_candidates} |"
        for each in taken
    ]
    return "\n".join(lines)


def write(taken: Sequence[Taken]) -> None:
    RESULTS.write_text(json.dumps([asdict(each) for each in taken], indent=1) + "\n")
    _write_table(PAGE, table(taken))


def write_plans(taken: Sequence[PlanTaken]) -> None:
    PLAN_RESULTS.write_text(json.dumps([asdict(each) for each in taken], indent=1) + "\n")
    _write_table(PLAN_PAGE, plan_table(taken))


def _write_table(page: Path, text: str) -> None:
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def read_plan_results() -> list[PlanTaken]:
    return [PlanTaken(**each) for each in json.loads(PLAN_RESULTS.read_text())]


def read_results() -> list[Taken]:
    return [Taken(**each) for each in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=RUNS, action="append", help="these models only")
    parser.add_argument(
        "--plans", action="store_true", help="the first plan of each model of PLANS"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        task = json.loads(arguments.worker)
        print(json.dumps(work(**task) if "rows" in task else work_plan(**task)))
        return
    if arguments.plans:
        plans = []
        for name in PLANS:
            plans.append(measure_plan(name))
            print(plan_table(plans).splitlines()[-1], flush=True)
        write_plans(plans)
        return
    taken = []
    for name in arguments.only or RUNS:
        taken.append(measure(name))
        each = taken[-1]
        print(
            f"{name:24} {each.wall_seconds:5.1f} s ({each.cpu_seconds:.1f} s of CPU, {each.import_cpu_seconds:.1f} of "
            f"them imports), {each.resident_bytes / 2**30:.2f} GiB; {NUM_FURTHER} more sizes "
            f"{each.further_wall_seconds:.1f} s ({each.further_cpu_seconds:.1f} of CPU)",
            flush=True,
        )
    if not arguments.only:
        write(taken)


if __name__ == "__main__":
    main()
