"""Run directories written without training, with known truths in them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fitune.run.directory import RunDirectory, create_run
from fitune.run.eval_rows import EvalRows, append_eval_rows
from fitune.run.files import write_json
from fitune.run.memory import MemorySample
from fitune.run.metrics import (
    EvalMetrics,
    RunEvent,
    StepMetrics,
    Summary,
    append_line,
    summary_json,
)

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the run was and what it reached. row_losses: of its last evaluation; noise: of the training loss;
    noise_ratio: of the gradient."""

    micro: int = 6
    accumulation: int = 4
    lr: float = 6e-5
    steps: int = 40
    row_tokens: int = 100
    tokens_per_second: float = 1000.0
    peak_bytes: int = 10 * GIB
    predicted_bytes: int = 10 * GIB
    row_losses: Sequence[float] = ()
    final_loss: float = 1.8
    noise: float = 0.0
    noise_ratio: float | None = None
    seed: int = 0
    evals: int = 4
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def effective(self) -> int:
        return self.micro * self.accumulation


def write_run(output: Path, name: str, recipe: Recipe) -> Path:
    run = create_run(output, name, overwrite=True)
    draw = np.random.default_rng(recipe.seed)
    tokens = recipe.effective * recipe.row_tokens
    seconds = tokens / recipe.tokens_per_second
    settings = {
        "model": {"source": "tiny"},
        "data": {"train": "sft.jsonl"},
        "batch": {"micro": recipe.micro, "accumulation": recipe.accumulation},
        "optim": {"lr": recipe.lr},
        "train": {"seed": 0},
        "run": {"name": name},
    }
    for section, keys in recipe.settings.items():
        settings[section] = settings.get(section, {}) | keys
    run.config.write_text(yaml.safe_dump(settings))
    lines = []
    loss = recipe.final_loss
    for step in range(1, recipe.steps + 1):
        loss = (
            recipe.final_loss
            + np.exp(-4 * step / recipe.steps)
            + recipe.noise * draw.standard_normal()
        )
        record = StepMetrics(
            step=step, tokens=tokens, supervised_tokens=tokens // 2, total_tokens=step * tokens, loss=float(loss),
            lr=recipe.lr, grad_norm=1.0, seconds=seconds, tokens_per_second=recipe.tokens_per_second,
            num_micro_batches=recipe.accumulation, micro_batch=recipe.micro,
            peak_allocated_bytes=recipe.peak_bytes - GIB // 4, peak_reserved_bytes=recipe.peak_bytes,
            noise_ratio=recipe.noise_ratio,
        )  # fmt: skip
        lines.append(json.dumps(asdict(record)))
    run.metrics.write_text("\n".join(lines) + "\n")
    rows = np.array(recipe.row_losses or [recipe.final_loss + 0.1] * 20)
    weights = tuple(float(1 + index % 7) for index in range(len(rows)))
    eval_loss = float("nan")
    for number in range(recipe.evals + 1):
        step = round(number * recipe.steps / recipe.evals)
        losses = rows + 1.0 - number / recipe.evals
        eval_loss = float(np.average(losses, weights=weights))
        append_line(
            run.metrics,
            EvalMetrics(
                step=step, total_tokens=step * tokens, eval_loss=eval_loss, eval_perplexity=float(np.exp(eval_loss)),
                eval_accuracy=0.5, eval_tokens=int(sum(weights)), seconds=1.0,
            ),
        )  # fmt: skip
        append_eval_rows(
            run.eval_rows,
            EvalRows(
                step=step,
                total_tokens=step * tokens,
                losses=tuple(map(float, losses)),
                weights=weights,
            ),
        )
    append_line(
        run.events, RunEvent(time=1e9 + 5, step=2, kind="memory_check", message="as predicted")
    )
    summary = Summary(
        status="finished", steps=recipe.steps, tokens=recipe.steps * tokens, seconds=recipe.steps * seconds,
        tokens_per_second=recipe.tokens_per_second, train_loss=float(loss), eval_loss=eval_loss,
        best_eval_loss=eval_loss, predicted_reserved_bytes=recipe.predicted_bytes,
        measured_reserved_bytes=recipe.peak_bytes, effective_batch=recipe.effective, data_hash="d",
    )  # fmt: skip
    write_json(run.summary, summary_json(summary))
    return run.path


def three_configurations(output: Path) -> list[Path]:
    """6 x 1 at 3e-5, then 6 x 4 and 4 x 6 at 6e-5: the same run in two splits, better and smaller."""
    draw = np.random.default_rng(1)
    rows = 2.0 + 0.5 * draw.standard_normal(200)
    small = list(rows + 0.05 + 0.02 * draw.standard_normal(200))
    large = list(rows)
    nearly = list(rows + 1e-4 * draw.standard_normal(200))
    first = Recipe(
        accumulation=1,
        lr=3e-5,
        steps=160,
        row_losses=small,
        peak_bytes=20 * GIB,
        predicted_bytes=19 * GIB,
    )
    second = Recipe(row_losses=large, peak_bytes=20 * GIB, tokens_per_second=1050.0)
    third = Recipe(micro=4, accumulation=6, row_losses=nearly, noise=1e-3, peak_bytes=14 * GIB)
    recipes = {"6x1": first, "6x4": second, "4x6": third}
    return [write_run(output, name, recipe) for name, recipe in recipes.items()]


def add_memory(run: Path, *, minutes: int = 30, peak_gib: float = 21.0) -> None:
    """Two lines a second; one moment takes `peak_gib`."""
    lines = []
    for index in range(minutes * 120):
        high = index == 1234
        sample = MemorySample(
            time=1e9 + index / 2, step=index // 10, allocated_bytes=9 * GIB, reserved_bytes=12 * GIB,
            peak_allocated_bytes=int((peak_gib - 1 if high else 10) * GIB),
            peak_reserved_bytes=int((peak_gib if high else 12) * GIB), state_bytes=2 * GIB,
            device_total_bytes=24 * GIB, other_processes_bytes=GIB,
        )  # fmt: skip
        lines.append(
            json.dumps({key: value for key, value in asdict(sample).items() if value is not None})
        )
    RunDirectory(run).memory.write_text("\n".join(lines) + "\n")


def add_plan(run: Path) -> None:
    candidate = {
        "micro_batch": 6, "accumulation": 4, "recompute": "off", "optimizer": "adamw", "method": "full", "fits": True,
        "predicted_reserved_bytes": 20 * GIB, "predicted_device_bytes": 20 * GIB, "peak_phase": "backward",
        "categories": {"parameter": GIB, "optimizer_state": 2 * GIB, "activation": 16 * GIB, "workspace": GIB},
    }  # fmt: skip
    plan = {
        "budget_bytes": 22 * GIB,
        "device": {"total_bytes": 24 * GIB},
        "candidates": [candidate],
        "chosen": 0,
    }
    write_json(RunDirectory(run).plan, plan)
    living = {"name": "model.layers.3.mlp", "op": "", "category": "activation", "num_bytes": GIB}
    peak = {
        "peak_phase": "backward",
        "categories": candidate["categories"],
        "modules": [living],
        "tensors": [],
    }
    write_json(RunDirectory(run).peak, peak)
    lengths = {"edges": list(range(0, 2049, 64)), "counts": [n % 7 for n in range(32)]}
    padding = {"fixed": 4.0, "shuffled": 1.5, "sorted": 1.03, "packed": 1.0}
    write_json(
        RunDirectory(run).data,
        {"max_length": 2048, "lengths": lengths, "train": {"padding": padding}},
    )
