"""Is the plan's choice the fastest that fits? On this CPU: four models, three budgets each. The ceilings of
planning/rates.py were fitted to three of them.

    python benchmarks/plan.py             about 20 minutes a model; writes benchmarks/results/plan.json after each
    python benchmarks/plan.py --quick     one model of two layers, one budget

Every candidate of a model is measured in processes of its own: real steps, CPU seconds on one thread, in three rounds
that take the candidates in turn. A shared machine becomes slower and faster from one second to the next, by more than
the candidates differ, so each step is held against those of the first candidate just before and after it; a candidate's
time is the median of these ratios, times that of the first one. Then for each budget `fitune train` runs in a process
whose data segment is limited to that budget (RLIMIT_DATA), where it plans by itself. Shown: the rank correlation of
predicted and measured time over the candidates, whether the run ended without an out-of-memory event, and how much
slower its choice is than the fastest candidate that fits by measurement.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from fitune.config import RunConfig, read_config
from fitune.model.load import build_model, quiet_transformers
from fitune.model.presets import llama_config, qwen3_config
from fitune.planning.choices import settings_of_candidate
from fitune.planning.limits import uniform_lengths
from fitune.planning.measure import MeasuredStep, measure_steps
from fitune.planning.plan import Candidate, Plan
from fitune.planning.search import choose_plan

LENGTH, ROWS = 256, 6
MODELS: dict[str, PretrainedConfig] = {
    "llama 6 x 256": llama_config(
        hidden_size=256, num_hidden_layers=6, head_dim=64, intermediate_size=704,
        num_attention_heads=4, num_key_value_heads=2,
    ),
    "qwen3 3 x 384": qwen3_config(
        hidden_size=384, num_hidden_layers=3, head_dim=64, intermediate_size=1024,
        num_attention_heads=6, num_key_value_heads=3,
    ),
    "llama 12 x 128": llama_config(
        hidden_size=128, num_hidden_layers=12, head_dim=32, intermediate_size=384,
        num_attention_heads=4, num_key_value_heads=4,
    ),
    "qwen3 8 x 192, not fitted to": qwen3_config(
        hidden_size=192, num_hidden_layers=8, head_dim=48, intermediate_size=512,
        num_attention_heads=4, num_key_value_heads=2,
    ),
}  # fmt: skip
QUICK = {
    "llama 2 x 256": llama_config(
        hidden_size=256, num_hidden_layers=2, head_dim=64, intermediate_size=704,
        num_attention_heads=4, num_key_value_heads=2,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """The bytes are of the resident peak, the program of a training run included."""

    setting: str
    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Run:
    """slower: than the fastest candidate that fits by measurement, as a share."""

    budget_bytes: int
    exit_code: int
    chosen: str | None
    peak_bytes: int | None
    num_ooms: int
    slower: float | None


def name(candidate: Candidate) -> str:
    return f"{candidate.micro_batch} x {candidate.accumulation}, {candidate.recompute}, {candidate.loss} loss"


def write_model(directory: Path, config: PretrainedConfig) -> None:
    words = [f"w{number}" for number in range(config.vocab_size - 3)]
    table = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    with quiet_transformers():
        build_model(config).save_pretrained(directory)


def write_rows(path: Path, vocabulary: int, *, num_rows: int = 160) -> None:
    """Rows that are all cut to LENGTH tokens."""
    draw = random.Random(0)
    rows = (
        " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(LENGTH + 8))
        for _ in range(num_rows)
    )
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def settings(directory: Path) -> dict[str, Any]:
    return {
        "model": {"source": str(directory)},
        "data": {
            "train": str(directory / "rows.jsonl"),
            "max_length": LENGTH,
            "eval_fraction": 0.0,
            "mask": "all",
        },
        "batch": {"effective": ROWS},
        "train": {"steps": 4, "save_every": 1000},
        "run": {"output": str(directory / "runs")},
    }


def measure(
    plan: Plan, config: RunConfig, program: int, *, num_rounds: int, num_pairs: int
) -> list[Measurement]:
    candidates = [each for each in plan.candidates if each.result == "same"]
    tree = config.model_dump(mode="json", exclude_defaults=True)
    settled = [
        read_config(tree, settings_of_candidate(candidate, config)).config
        for candidate in candidates
    ]
    ratios: list[list[float]] = [[] for _ in candidates]
    peaks = [0] * len(candidates)
    with measured_apart(settled[0]) as reference:
        seen = [reference().cpu_seconds]
        for _ in range(num_rounds):
            for number, candidate in enumerate(candidates):
                with measured_apart(settled[number]) as own:
                    for _ in range(num_pairs):
                        step = own()
                        seen.append(reference().cpu_seconds)
                        ratios[number].append(step.cpu_seconds / mean(seen[-2:]))
                        peaks[number] = max(peaks[number], step.peak.device_bytes or 0)
                print(
                    f"  {name(candidate)}: x {median(ratios[number]):.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    return [
        Measurement(
            name(candidate),
            candidate.predicted_seconds_per_step or 0.0,
            median(own_ratios) * median(seen),
            program + candidate.predicted_device_bytes - plan.device.context_bytes,
            program + peak,
        )
        for candidate, own_ratios, peak in zip(candidates, ratios, peaks, strict=True)
    ]


@contextmanager
def measured_apart(config: RunConfig) -> Iterator[Callable[[], MeasuredStep]]:
    """Each call is a step, in a process of its own: what a heap has been through makes a step slower or faster by a
    tenth, and a training run's heap has seen its own setting alone. All on one core, and one at a time."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_answer, args=(config, there), daemon=True
    )
    process.start()

    def step() -> MeasuredStep:
        here.send(None)
        return here.recv()  # type: ignore[no-any-return]

    try:
        yield step
    finally:
        process.kill()
        process.join()


def _answer(config: RunConfig, pipe: Connection) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    steps = measure_steps(
        config, repeat(((LENGTH, LENGTH - 1),) * ROWS), device=torch.device("cpu")
    )
    while True:
        pipe.recv()
        pipe.send(next(steps))


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: of the ranks, ties sharing theirs."""
    ranks = []
    for values in (first, second):
        array = np.array(values)
        ranks.append([(array < value).sum() + (array == value).sum() / 2 for value in array])
    return float(np.corrcoef(*ranks)[0, 1])


def train(
    directory: Path, name: str, *words: str, limit_bytes: int | None = None
) -> tuple[int, Path]:
    """`fitune train` in a process of its own, which can have no more than the limit: (exit code, run directory)."""
    path = directory / "run.json"
    path.write_text(json.dumps(settings(directory)))
    command = [sys.executable, "-m", "fitune", "train", str(path), f"run.name={name}", *words]

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    # Arrow's own allocator reserves a gigabyte of addresses that it never touches, and RLIMIT_DATA counts addresses
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        command, preexec_fn=limit, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
    return done.returncode, directory / "runs" / name


def run(directory: Path, budget: int, measured: list[Measurement], number: int) -> Run:
    exit_code, place = train(
        directory, f"run{number}", f"memory.budget={budget}B", limit_bytes=budget
    )
    if exit_code != 0:
        return Run(budget, exit_code, None, None, 0, None)
    plan = json.loads((place / "plan.json").read_text())
    chosen = plan["candidates"][plan["chosen"]]
    setting = f"{chosen['micro_batch']} x {chosen['accumulation']}, {chosen['recompute']}, {chosen['loss']} loss"
    summary = json.loads((place / "summary.json").read_text())
    fitting = [each.measured_seconds for each in measured if each.measured_bytes <= budget]
    own = next(each.measured_seconds for each in measured if each.setting == setting)
    return Run(
        budget_bytes=budget,
        exit_code=0,
        chosen=setting,
        peak_bytes=summary["measured_device_bytes"],
        num_ooms=summary["num_ooms"],
        slower=own / min(fitting) - 1 if fitting else None,
    )


def benchmark(
    config: PretrainedConfig, *, budgets: tuple[float, ...], num_rounds: int, num_pairs: int
) -> dict[str, Any]:
    """budgets: where each lies between the smallest and the largest candidate, as a share."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        write_model(directory, config)
        write_rows(directory / "rows.jsonl", config.vocab_size - 3)
        whole = read_config(settings(directory)).config
        plan = choose_plan(whole, gpu="cpu", lengths=uniform_lengths(whole.data))
        _, free_run = train(directory, "free", "train.steps=1")
        program = json.loads((free_run / "plan.json").read_text())["device"]["context_bytes"]
        measured = measure(plan, whole, program, num_rounds=num_rounds, num_pairs=num_pairs)
        sizes = [each.predicted_bytes for each in measured]
        limits = [int(min(sizes) * 1.02 + share * (max(sizes) - min(sizes))) for share in budgets]
        runs = [run(directory, limit, measured, number) for number, limit in enumerate(limits)]
    predicted, found = (
        [getattr(each, key) for each in measured]
        for key in ("predicted_seconds", "measured_seconds")
    )
    return {
        "rank_correlation": rank_correlation(predicted, found),
        "candidates": [asdict(each) for each in measured],
        "runs": [asdict(each) for each in runs],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--model", help="only those whose name contains this; the others' results stay"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "plan.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        QUICK if options.quick else {k: v for k, v in MODELS.items() if (options.model or "") in k}
    )
    if not wanted:
        parser.error(f"no model's name contains {options.model!r}: there are {', '.join(MODELS)}")
    shares, num_rounds, num_pairs = ((1.0,), 1, 1) if options.quick else ((0.3, 0.6, 1.0), 3, 4)
    results: dict[str, Any] = {}
    if options.model and options.output.exists():
        results = json.loads(options.output.read_text())["models"]
    options.output.parent.mkdir(exist_ok=True)
    for title, config in wanted.items():
        results[title] = found = benchmark(
            config, budgets=shares, num_rounds=num_rounds, num_pairs=num_pairs
        )
        print(f"{title}: rank correlation {found['rank_correlation']:.3f}")
        for each in found["runs"]:
            slower = "n/a" if each["slower"] is None else f"{each['slower']:+.1%}"
            print(
                f"  budget {each['budget_bytes'] / 2**20:.0f} MiB: exit {each['exit_code']}, {each['chosen']}, "
                f"{each['num_ooms']} times out of memory, {slower} against the fastest that fits"
            )
        if not options.quick:
            options.output.write_text(
                json.dumps({"torch": torch.__version__, "models": results}, indent=1) + "\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
