"""What the safe step costs while memory suffices, beside the plain step, in time and in peak memory.

python benchmarks/safe_step.py            a model of 25.8 M parameters and SmolLM2-135M with LoRA: about 5 minutes
python benchmarks/safe_step.py --quick    a small model

Both steps are done in turns by one process (A, B, B, A, ...), on the same micro-batches and one thread; seconds are of
the processor. The safe step includes all that a run adds around it: the free memory and the peak are read, the size of
the micro-batches is chosen and learned, what is not there is refused. Writes benchmarks/results/safe_step.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fitune.cli.demo import smollm2_file
from fitune.config import LoraConfig, ModelConfig
from fitune.data.packing import split
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.errors import UsageError
from fitune.machine.process_memory import held_bytes, read_peak, reset_peak
from fitune.model.head import Head, decoder_and_head
from fitune.model.load import build_model, load_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import attention_name
from fitune.model.precision import resolve_precision
from fitune.model.presets import llama_config
from fitune.objectives.supervised import Supervised
from fitune.recovery.observed import allocatable_bytes, observed
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel, choose_size
from fitune.recovery.step import safe_step
from fitune.step.optimizer_state import create_state
from fitune.step.work import StepSettings, micro_batch_work, train_step

RESULTS = Path(__file__).parent / "results" / "safe_step.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """Of pairs of steps, one of each kind: seconds of the fastest, which other work on the machine disturbs least, and
    medians of the rest. overhead_fraction: of the fastest plain step; overhead_of_pairs: of the plain step beside it.
    extra_peak_bytes: of the resident peak above what was held."""

    name: str
    num_parameters: int
    num_pairs: int
    plain_seconds: float
    safe_seconds: float
    overhead_fraction: float
    overhead_of_pairs: float
    plain_peak_bytes: int
    extra_peak_bytes: int


def compare(
    name: str, model: nn.Module, micro_batches: list[MicroBatch], *, commit: bool, num_pairs: int
) -> Cost:
    head = decoder_and_head(model)
    assert isinstance(head, Head)
    settings = StepSettings(Supervised(head), commit=commit)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
    )
    create_state(optimizer)
    protection = Protection(work=micro_batch_work(model, optimizer, settings))
    memory = MemoryModel(planned=max(micro_batch.num_positions for micro_batch in micro_batches))
    num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)

    def plain() -> None:
        train_step(model, optimizer, micro_batches, settings=settings)

    def safe() -> None:
        free_bytes = allocatable_bytes(CPU)
        choose_size(memory, free_bytes)
        observed(
            memory,
            lambda: safe_step(protection, micro_batches, step=1),
            device=CPU,
            free_bytes=free_bytes,
            num_tokens=num_tokens,
        )

    for step in (plain, safe, plain):
        step()
    measured: dict[Callable[[], None], list[tuple[float, int]]] = {plain: [], safe: []}
    for number in range(num_pairs):
        for step in (plain, safe) if number % 2 else (safe, plain):
            measured[step].append(_measure(step))
    ratios = [b[0] / a[0] for a, b in zip(measured[plain], measured[safe], strict=True)]
    plain_seconds, safe_seconds = (
        min(seconds for seconds, _ in measured[step]) for step in (plain, safe)
    )
    return Cost(
        name=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_pairs=num_pairs,
        plain_seconds=plain_seconds,
        safe_seconds=safe_seconds,
        overhead_fraction=safe_seconds / plain_seconds - 1,
        overhead_of_pairs=statistics.median(ratios) - 1,
        plain_peak_bytes=int(statistics.median(peak for _, peak in measured[plain])),
        extra_peak_bytes=int(
            statistics.median(b[1] - a[1] for a, b in zip(*measured.values(), strict=True))
        ),
    )


def _measure(step: Callable[[], None]) -> tuple[float, int]:
    reset_peak(CPU)
    held, start = held_bytes(CPU), time.process_time()
    step()
    return time.process_time() - start, (read_peak(CPU).device_bytes or 0) - held


def packed_rows(
    *, vocab_size: int, num_rows: int, row_tokens: int, micro_tokens: int
) -> list[MicroBatch]:
    draw = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        weights = np.ones(row_tokens, np.float32)
        weights[: row_tokens // 2] = 0
        rows.append(Row(number, draw.integers(3, vocab_size, row_tokens, dtype=np.int32), weights))
    return split(Batch(tuple(rows)), packed=True, micro_tokens=micro_tokens)


def small_model(hidden_size: int, num_layers: int) -> nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": 6400,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 8,
        "max_position_embeddings": 1024,
    }
    config = llama_config(**shape)
    return build_model(config, attention=attention_name(config, "auto"), seed=0).train()


def smollm2_lora() -> nn.Module | None:
    try:
        source = smollm2_file()
    except UsageError:
        return None
    model = load_model(
        ModelConfig(source=str(source)),
        CPU,
        precision=resolve_precision(ModelConfig(source="x"), "cpu", False),
    )
    return apply_lora(model, LoraConfig()).train()  # type: ignore[arg-type]


def measure(*, quick: bool) -> list[Cost]:
    if quick:
        rows = packed_rows(vocab_size=6400, num_rows=4, row_tokens=64, micro_tokens=128)
        return [compare("small, full", small_model(128, 2), rows, commit=False, num_pairs=4)]
    rows = packed_rows(vocab_size=6400, num_rows=4, row_tokens=256, micro_tokens=512)
    costs = [compare("25.8 M, full", small_model(512, 8), rows, commit=False, num_pairs=20)]
    if (model := smollm2_lora()) is not None:
        rows = packed_rows(vocab_size=49152, num_rows=4, row_tokens=128, micro_tokens=256)
        costs.append(compare("SmolLM2-135M, LoRA", model, rows, commit=True, num_pairs=10))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    costs = measure(quick=quick)
    print(f"{'':20} {'plain':>9} {'safe':>9} {'time':>8} {'in pairs':>8} {'peak':>10} {'extra':>9}")
    for cost in costs:
        print(
            f"{cost.name:20} {cost.plain_seconds:8.3f}s {cost.safe_seconds:8.3f}s {cost.overhead_fraction:+8.1%} "
            f"{cost.overhead_of_pairs:+8.1%} {cost.plain_peak_bytes / 2**20:7.1f}MiB "
            f"{cost.extra_peak_bytes / 2**20:6.1f}MiB"
        )
    if not quick:
        RESULTS.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
