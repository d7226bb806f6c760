"""Predicts the memory of training steps on this machine's CPU and measures them, under three C allocators.

python benchmarks/cpu_accuracy.py            all settings; writes results/cpu_accuracy.json and docs/accuracy.md
python benchmarks/cpu_accuracy.py --quick    one small setting under each allocator; prints, writes nothing
python benchmarks/cpu_accuracy.py --settings small-full,small-lora --allocators mapped     only these; keeps the others

A setting is measured in a process of its own: the model is loaded, two optimizer steps are done, and the peak of the
resident set during the second one (VmHWM, reset before it) above what the process held before the model was loaded is
compared with the prediction of that step. One thread; Linux only. tcmalloc is used where it is installed (Debian:
libtcmalloc-minimal4).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fitune.cli.demo import smollm2_file
from fitune.config import RunConfig, read_config
from fitune.errors import UsageError
from fitune.machine.devices import cpu_device
from fitune.machine.environment import find_tcmalloc

RESULTS = Path(__file__).parent / "results" / "cpu_accuracy.json"
LIMIT_SECONDS = 1800
NUM_AT_ONCE = 2

Allocator = Literal["mapped", "glibc", "tcmalloc"]
ALLOCATORS: tuple[Allocator, ...] = ("mapped", "glibc", "tcmalloc")


@dataclass(frozen=True, slots=True)
class Setting:
    """source: a preset, or the installed SmolLM2. `micro` rows of `length` tokens in each of `accumulation`
    micro-batches, every token supervised."""

    name: str
    source: str
    length: int
    micro: int
    options: tuple[str, ...] = ()
    accumulation: int = 1

    @property
    def num_rows(self) -> int:
        return self.micro * self.accumulation

    def config(self) -> RunConfig:
        is_preset = self.source != "smollm2"
        tree = {
            "model": {
                "source": self.source if is_preset else _smollm2(),
                "init": "random" if is_preset else "pretrained",
            },
            "data": {"train": "rows.jsonl", "max_length": self.length, "eval_fraction": 0.0},
            "batch": {"micro": self.micro, "accumulation": self.accumulation},
        }
        return read_config(tree, list(self.options)).config

    def __str__(self) -> str:
        micro = f"{self.accumulation} x " if self.accumulation > 1 else ""
        return ", ".join((self.source, f"{micro}{self.micro} x {self.length}", *self.options))


LORA, RECOMPUTE, FULL_LOGITS = "model.method=lora", "model.recompute=full", "loss=full"
SETTINGS = (
    Setting("small-full", "minimind2-small", 512, 4),
    Setting("small-logits", "minimind2-small", 512, 4, (FULL_LOGITS,)),
    Setting("small-recompute", "minimind2-small", 256, 8, (RECOMPUTE,)),
    Setting("small-accumulate", "minimind2-small", 512, 1, accumulation=3),
    Setting("small-lora", "minimind2-small", 512, 4, (LORA,)),
    Setting("minimind3-full", "minimind-3", 256, 4),
    Setting("minimind3-every-2", "minimind-3", 512, 2, ("model.recompute=every_2",)),
    Setting(
        "minimind3-selective", "minimind-3", 256, 4, ("model.recompute=selective", FULL_LOGITS)
    ),
    Setting("minimind3-lora", "minimind-3", 1024, 1, (LORA,)),
    Setting("minimind2-full", "minimind2", 256, 2, accumulation=2),
    Setting("minimind2-recompute", "minimind2", 128, 8, (RECOMPUTE, FULL_LOGITS)),
    Setting("minimind2-lora", "minimind2", 256, 4, (LORA, RECOMPUTE)),
    Setting("smollm2-full", "smollm2", 128, 2),
    Setting("smollm2-recompute", "smollm2", 256, 1, (RECOMPUTE,)),
    Setting("smollm2-lora-logits", "smollm2", 256, 2, (LORA, FULL_LOGITS)),
)
QUICK = Setting("quick", "minimind2-small", 128, 2)
BY_NAME = {setting.name: setting for setting in (*SETTINGS, QUICK)}


def _smollm2() -> str:
    try:
        return str(smollm2_file())
    except UsageError as error:
        raise SystemExit(f"the settings of SmolLM2 need their package: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """live_bytes: of the tensors at the predicted peak; predicted_bytes: what the process then holds for them.
    file_bytes: how much of the measured bytes are pages of program files. failure: why there is no measurement."""

    name: str
    setting: str
    allocator: Allocator
    live_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    file_bytes: int | None = None
    failure: str | None = None

    @property
    def error_fraction(self) -> float | None:
        if self.predicted_bytes is None or self.measured_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


# ---- in the process that measures -----------------------------------------------------------------------------------


def measure_here(setting: Setting) -> dict[str, Any]:
    import numpy as np
    import psutil
    import torch

    from fitune.data.rows import Batch, Row
    from fitune.machine.process_memory import program_bytes, read_peak, reset_peak
    from fitune.model.load import load_model, load_tokenizer
    from fitune.step.assemble import assemble, choose_precision
    from fitune.step.work import train_step

    torch.set_num_threads(1)
    device, config = torch.device("cpu"), setting.config()
    if setting.source == "smollm2":  # as in a run, the tokenizer comes before the model
        load_tokenizer(config.model)
    before, files_before = program_bytes(device), psutil.Process().memory_info().shared
    model = load_model(
        config.model,
        device,
        precision=choose_precision(config.model, device),
        seed=config.train.seed,
    )
    setup = assemble(model, config, device=device, precision=choose_precision(config.model, device))
    generator = np.random.default_rng(0)
    weights = np.ones(setting.length, np.float32)
    weights[0] = 0
    rows = tuple(
        Row(
            number,
            generator.integers(0, model.config.vocab_size, setting.length).astype(np.int32),
            weights,
        )
        for number in range(setting.num_rows)
    )
    micro_batches = setup.layout.split(Batch(rows))
    for _ in range(2):
        reset_peak(device)
        train_step(
            setup.model,
            setup.optimizer,
            micro_batches,
            settings=setup.settings,
            scaler=setup.scaler,
        )
    peak = read_peak(device).device_bytes
    assert peak is not None
    assert before is not None
    return {
        "measured_bytes": peak - before,
        "file_bytes": psutil.Process().memory_info().shared - files_before,
        "predicted": _predict(setting, config),
    }


def _predict(setting: Setting, config: RunConfig) -> dict[str, int]:
    """Of the second step. After the measurement, so that it is no part of it."""
    from fitune.planning.predict import predict_run
    from fitune.trace.own_step import Pass

    rows = ((setting.length, setting.length - 1),) * setting.num_rows
    passes = [Pass("train", rows, most_micro_batches=setting.accumulation)] * 2
    prediction = predict_run(config, cpu_device(), passes=passes).training
    return {
        "live_bytes": prediction.peak_allocated_bytes,
        "predicted_bytes": prediction.peak_reserved_bytes,
    }


def environment_of(allocator: Allocator) -> dict[str, str] | None:
    """None where the allocator is not installed."""
    own = {"MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"}
    environment = {name: value for name, value in os.environ.items() if name not in own} | {
        "OMP_NUM_THREADS": "1"
    }
    if allocator == "mapped":
        return environment | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    if allocator == "tcmalloc":
        library = find_tcmalloc()
        return None if library is None else environment | {"LD_PRELOAD": library}
    return environment


def compare(setting: Setting, allocator: Allocator) -> Compared:
    """The setting, measured and predicted in a process of its own."""
    row = {"name": setting.name, "setting": str(setting), "allocator": allocator}
    environment = environment_of(allocator)
    if environment is None:
        return Compared(**row, failure="not installed")
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", setting.name],
            env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Compared(**row, failure=f"not done after {LIMIT_SECONDS} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Compared(**row, failure=lines[-1] if lines else f"exit code {done.returncode}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Compared(**row, **answer.pop("predicted"), **answer)


# ---- the table ------------------------------------------------------------------------------------------------------


def read_results() -> list[Compared]:
    return (
        [Compared(**row) for row in json.loads(RESULTS.read_text())["settings"]]
        if RESULTS.exists()
        else []
    )


def section() -> list[str]:
    """The part of docs/accuracy.md about this benchmark; empty where it was never run."""
    rows = read_results()
    if not rows:
        return []
    return [
        "# On a CPU",
        "",
        "Generated by `python benchmarks/cpu_accuracy.py`, with one thread. Each setting ran in a process of its own:",
        "the peak of the resident set in its second optimizer step, above what the process held before the model was",
        "loaded. *mapped*: glibc with MALLOC_MMAP_THRESHOLD_=65536. *live*: the tensors alone. How the prediction",
        "follows from them is in `machine/libc.py`.",
        "",
        *summary(rows),
        "",
        "| setting | allocator | live bytes | predicted bytes | measured bytes | error |",
        "|---|---|---:|---:|---:|---:|",
        *(_line(row) for row in rows),
        "",
    ]


def summary(rows: Iterable[Compared]) -> list[str]:
    lines = []
    for allocator in ALLOCATORS:
        errors = [
            error
            for row in rows
            if row.allocator == allocator and (error := row.error_fraction) is not None
        ]
        if errors:
            sizes = sorted(errors, key=abs)
            lines.append(
                f"- {allocator}: median error {median(map(abs, errors)):.1%}, worst {sizes[-1]:+.1%} of {len(errors)}"
            )
    return lines


def _line(row: Compared) -> str:
    if row.error_fraction is None:
        return f"| {row.setting} | {row.allocator} | n/a | n/a | n/a | {row.failure} |"
    sizes = f"{row.live_bytes:,} | {row.predicted_bytes:,} | {row.measured_bytes:,}"
    return f"| {row.setting} | {row.allocator} | {sizes} | {row.error_fraction:+.1%} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small setting under each allocator"
    )
    parser.add_argument("--settings", default="", help="only these, separated by commas")
    parser.add_argument("--allocators", default="", help="only these, separated by commas")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure_here(BY_NAME[options.measure])))
        return 0
    names = [name for name in options.settings.split(",") if name]
    kinds = [kind for kind in options.allocators.split(",") if kind]
    if unknown := sorted({*names} - {*BY_NAME}) + sorted({*kinds} - {*ALLOCATORS}):
        parser.error(f"unknown: {', '.join(unknown)}")
    settings = (
        [QUICK] if options.quick else [each for each in SETTINGS if not names or each.name in names]
    )
    pairs = [(each, kind) for kind in ALLOCATORS for each in settings if not kinds or kind in kinds]
    rows = []
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for row in pool.map(lambda pair: compare(*pair), pairs):
            rows.append(row)
            said = row.failure if row.error_fraction is None else f"{row.error_fraction:+.1%}"
            print(f"{row.name} {row.allocator}: {said}", file=sys.stderr, flush=True)
            if not options.quick:
                keep(row)
    print("\n".join(map(_line, rows)))
    print("\n".join(summary(rows)))
    return 1 if any(row.failure for row in rows if row.allocator != "tcmalloc") else 0


def keep(row: Compared) -> None:
    """In place of the earlier row of this setting and allocator; the page is written anew."""
    import accuracy

    rows = {(each.name, each.allocator): each for each in read_results()} | {
        (row.name, row.allocator): row
    }
    order = [(name, allocator) for name in BY_NAME for allocator in ALLOCATORS]
    kept = [asdict(rows[place]) for place in order if place in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": version("torch"), "settings": kept}, indent=1) + "\n")
    accuracy.write(accuracy.read_results())


if __name__ == "__main__":
    sys.exit(main())
