"""Predicts the memory of training steps on this machine's NVIDIA card, runs them, and compares: the peaks, and every
allocation in its order. Without a card it says so and does nothing.

python benchmarks/gpu_accuracy.py                    all settings; writes results/gpu_accuracy.json, docs/accuracy.md
python benchmarks/gpu_accuracy.py --settings full,lora   only these; prints, writes nothing
python benchmarks/gpu_accuracy.py --plan "RTX 4090"  what would be run on such a card, and its share; needs no card

A setting runs in a process of its own with the rows that its prediction assumes: the model is loaded, PyTorch's
allocator history is switched on, two optimizer steps are done, the peaks of the second are read. The history
(torch.cuda.memory._snapshot) is then held against the recording that the prediction was made from.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from fitune.config import RunConfig, read_config
from fitune.machine.cards import Device
from fitune.machine.devices import find_device, this_machine
from fitune.planning.predict import RunPrediction, predict_run
from fitune.trace.own_step import Pass
from fitune.trace.snapshot import read_snapshot
from fitune.units import GIB
from rehearsal.difference import first_difference, num_births

RESULTS = Path(__file__).parent / "results" / "gpu_accuracy.json"
SMALLEST_GIB = 7.5
"""Visible on an 8 GB card."""
LIMIT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Setting:
    """micro: rows of a micro-batch on an 8 GB card; larger cards take proportionally more."""

    name: str
    source: str
    length: int
    micro: int
    options: tuple[str, ...] = ()
    accumulation: int = 1

    def rows(self, device: Device) -> int:
        return max(1, int(self.micro * device.total_bytes / (SMALLEST_GIB * GIB)))

    def config(self, device: Device) -> RunConfig:
        tree = {
            "model": {"source": self.source, "init": "random"},
            "data": {"train": "rows.jsonl", "max_length": self.length, "eval_fraction": 0.0},
            "batch": {"micro": self.rows(device), "accumulation": self.accumulation},
        }
        return read_config(tree, list(self.options)).config

    def passes(self, device: Device) -> list[Pass]:
        """Every token of every row is supervised."""
        rows = ((self.length, self.length - 1),) * (self.rows(device) * self.accumulation)
        return [Pass("train", rows, most_micro_batches=self.accumulation)] * 2


LORA, RECOMPUTE = "model.method=lora", "model.recompute=full"
SETTINGS = (
    Setting("full", "minimind2", 2048, 2),
    Setting("full-logits", "minimind2", 2048, 2, ("loss=full",)),
    Setting("recompute", "minimind2", 2048, 8, (RECOMPUTE,)),
    Setting("every-2", "minimind2", 2048, 6, ("model.recompute=every_2",)),
    Setting("selective", "minimind-3", 1024, 4, ("model.recompute=selective",)),
    Setting("lora", "minimind2", 2048, 2, (LORA,)),
    Setting("lora-recompute", "minimind2", 2048, 8, (LORA, RECOMPUTE)),
    Setting("accumulation", "minimind-3", 512, 8, accumulation=3),
    Setting("padded", "minimind-3", 1024, 4, ("data.packing=false",)),
    Setting("float32", "minimind2-small", 1024, 4, ("model.precision=float32",)),
    Setting("float16", "minimind2-small", 1024, 8, ("model.precision=autocast_float16",)),
    Setting("foreach", "minimind-3", 512, 4, ("optim.name=adamw_foreach",)),
    Setting("expandable", "minimind2", 1024, 4, ("memory.allocator=expandable_segments:True",)),
    Setting("math", "minimind2-small", 512, 4, ("model.attention=math",)),
)


BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of the second step. device_bytes: of this process as NVML tells it, else what the card has in use more than
    before; None where neither can be told."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """measured and what follows from it are None where `failure` says why there is nothing. difference: the first event
    that differs; None where none of the num_events does."""

    name: str
    setting: str
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int
    predicted_device_bytes: int
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    measured_device_bytes: int | None = None
    num_events: int | None = None
    num_equal_events: int | None = None
    difference: str | None = None
    failure: str | None = None

    def error(self, metric: str) -> float | None:
        measured = getattr(self, f"measured_{metric}_bytes")
        predicted: int = getattr(self, f"predicted_{metric}_bytes")
        return None if measured is None else predicted / measured - 1


Measure = Callable[[Setting, Device, Path], Measured]


def compare(setting: Setting, device: Device, *, measure: Measure) -> Compared:
    """measure: does the steps and writes their snapshot to the path."""
    prediction = predict_run(setting.config(device), device, passes=setting.passes(device))
    row = Compared(
        name=setting.name,
        setting=describe(setting, device),
        predicted_allocated_bytes=prediction.training.peak_allocated_bytes,
        predicted_reserved_bytes=prediction.training.peak_reserved_bytes,
        predicted_device_bytes=prediction.training.peak_reserved_bytes + prediction.context_bytes,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot.pickle"
        try:
            measured = measure(setting, device, path)
        except (subprocess.SubprocessError, ValueError, KeyError, OSError) as error:
            return Compared(**(asdict(row) | {"failure": f"{type(error).__name__}: {error}"}))
        return Compared(**(asdict(row) | _against(measured, prediction, path)))


def _against(measured: Measured, prediction: RunPrediction, path: Path) -> dict[str, Any]:
    recorded = prediction.recorded.trace
    difference = first_difference(recorded, read_snapshot(path))
    num_events = num_births(recorded)
    return {
        "measured_allocated_bytes": measured.allocated_bytes,
        "measured_reserved_bytes": measured.reserved_bytes,
        "measured_device_bytes": measured.device_bytes,
        "num_events": num_events,
        "num_equal_events": num_events if difference is None else difference.index,
        "difference": None if difference is None else str(difference),
    }


def describe(setting: Setting, device: Device) -> str:
    micro = f"{setting.accumulation} x " if setting.accumulation > 1 else ""
    return ", ".join(
        (setting.source, f"{micro}{setting.rows(device)} x {setting.length}", *setting.options)
    )


# ---- in the process that measures -----------------------------------------------------------------------------------


def measure_apart(setting: Setting, device: Device, path: Path) -> Measured:
    """`measure_here` in a process of its own, with the allocator that the setting names."""
    allocator = setting.config(device).memory.allocator
    environment = os.environ | {"PYTORCH_ALLOC_CONF": allocator, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    command = [sys.executable, __file__, "--measure", setting.name, "--snapshot", str(path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise subprocess.SubprocessError(last[:300])
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure_here(setting: Setting, device: Device, path: Path) -> Measured:
    import numpy as np
    import torch

    from fitune.data.rows import Batch, Row
    from fitune.model.load import load_model
    from fitune.step.assemble import assemble, choose_precision
    from fitune.step.work import train_step

    card = torch.device("cuda", 0)
    free_before, _ = torch.cuda.mem_get_info(card)
    config = setting.config(device)
    precision = choose_precision(config.model, card)
    model = load_model(config.model, card, precision=precision, seed=config.train.seed)
    setup = assemble(model, config, device=card, precision=precision)
    generator = np.random.default_rng(0)
    weights = np.ones(setting.length, np.float32)
    weights[0] = 0
    (first, *_), vocabulary = setting.passes(device), model.config.vocab_size
    rows = tuple(
        Row(number, generator.integers(0, vocabulary, length).astype(np.int32), weights)
        for number, (length, _) in enumerate(first.rows)
    )
    micro_batches = setup.layout.split(Batch(rows))
    torch.cuda.memory._record_memory_history(stacks="python")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(card)
        train_step(
            setup.model,
            setup.optimizer,
            micro_batches,
            settings=setup.settings,
            scaler=setup.scaler,
        )
    torch.cuda.synchronize(card)
    measured = Measured(
        allocated_bytes=torch.cuda.max_memory_allocated(card),
        reserved_bytes=torch.cuda.max_memory_reserved(card),
        device_bytes=_process_bytes() or free_before - torch.cuda.mem_get_info(card)[0],
    )
    path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))
    return measured


def _process_bytes() -> int | None:
    """What this process has on its card, as nvidia-smi shows it; None in a container or on WSL, where NVML cannot
    tell."""
    from fitune.machine.nvml import read_cards

    processes = [process for card in read_cards() for process in card.processes]
    return next((process.used_bytes for process in processes if process.pid == os.getpid()), None)


# ---- the table ------------------------------------------------------------------------------------------------------


def section() -> list[str]:
    """The part of docs/accuracy.md about runs on a card; empty where none was run."""
    if not RESULTS.exists():
        return []
    content = json.loads(RESULTS.read_text())
    rows = [Compared(**row) for row in content["settings"]]
    rehearsed = content.get("rehearsed", False)
    card = f"a rehearsed {content['card']} (rehearsal.md)" if rehearsed else content["card"]
    lines = [
        "# On a rehearsed card" if rehearsed else "# On a card",
        "",
        f"Generated by `python benchmarks/gpu_accuracy.py` on {card}, driver {content['driver']}, torch "
        f"{content['torch']}. Each setting ran in a process of its own; peaks are those of its second step. Events are",
        "the allocations of both steps: how many agree, in order and to the byte, before the first that does not.",
        "",
        *summary(rows),
        "",
        "| setting | allocated | error | reserved | error | device | error | equal events |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(row) for row in rows),
        "",
    ]
    lines += [f"- {row.name} was not measured: {row.failure}" for row in rows if row.failure]
    return lines


def summary(rows: Sequence[Compared]) -> list[str]:
    """Median and worst of the absolute errors, one line a metric."""
    lines = []
    for metric in ("allocated", "reserved", "device"):
        errors = [abs(error) for row in rows if (error := row.error(metric)) is not None]
        if errors:
            lines.append(
                f"- {metric}: median error {median(errors):.3%}, worst {max(errors):.3%} of {len(errors)}"
            )
    return lines or ["- nothing was measured"]


def _line(row: Compared) -> str:
    cells = []
    for metric in ("allocated", "reserved", "device"):
        measured, error = getattr(row, f"measured_{metric}_bytes"), row.error(metric)
        cells += ["n/a", "n/a"] if error is None else [f"{measured:,}", f"{error:+.3%}"]
    equal = "n/a" if row.num_events is None else f"{row.num_equal_events:,} of {row.num_events:,}"
    return f"| {row.name}: {row.setting} | {' | '.join(cells)} | {equal} |"


def write(rows: Sequence[Compared], device: Device) -> None:
    import accuracy
    from fitune.machine.environment import driver_version

    content = {
        "card": device.name,
        "driver": driver_version(),
        "torch": version("torch"),
        "rehearsed": "FAKE_CARD" in os.environ,
        "settings": [asdict(row) for row in rows],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    accuracy.write(accuracy.read_results())


def show(row: Compared) -> None:
    if row.failure:
        print(f"{row.name}: not measured: {row.failure}", flush=True)
        return
    errors = ", ".join(
        f"{metric} {error:+.3%}"
        for metric in ("allocated", "reserved", "device")
        if (error := row.error(metric)) is not None
    )
    print(
        f"{row.name}: {errors}; {row.num_equal_events:,} of {row.num_events:,} events equal",
        flush=True,
    )
    if row.difference:
        print(row.difference, flush=True)


def plan(device: Device, settings: Sequence[Setting]) -> None:
    for setting in settings:
        prediction = predict_run(setting.config(device), device, passes=setting.passes(device))
        needed = prediction.training.peak_reserved_bytes + prediction.context_bytes
        print(
            f"{setting.name}: {describe(setting, device)}: {needed / device.total_bytes:.0%} of the card",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None, *, measure: Measure = measure_apart) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="", help="only these, separated by commas")
    parser.add_argument("--plan", default="", help="a card of the catalogue to plan for")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    parser.add_argument("--snapshot", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = [name for name in options.settings.split(",") if name]
    if unknown := sorted({*wanted} - {*BY_NAME}):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    settings = [setting for setting in SETTINGS if not wanted or setting.name in wanted]
    if options.plan:
        plan(find_device(options.plan), settings)
        return 0
    device = next(iter(this_machine()), None)
    if device is None:
        print(
            "no NVIDIA card here: nothing is measured; --plan NAME shows what would be run on a card"
        )
        return 0
    if options.measure:
        print(
            json.dumps(
                asdict(measure_here(BY_NAME[options.measure], device, Path(options.snapshot)))
            )
        )
        return 0
    rows = []
    for setting in settings:
        rows.append(compare(setting, device, measure=measure))
        show(rows[-1])
    print("\n".join(summary(rows)))
    if not wanted:
        write(rows, device)
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
