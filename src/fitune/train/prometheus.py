"""The present numbers of a run as a text file in Prometheus' exposition format, for node_exporter's textfile collector:
https://prometheus.io/docs/instrumenting/exposition_formats/."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fitune.run.directory import write_atomically
from fitune.run.memory import MemorySample
from fitune.run.metrics import StepMetrics

_STEP_NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_second", "total_tokens")


def write_prometheus(path: Path, run_name: str, *, sample: MemorySample, metrics: StepMetrics | None) -> None:
    """Every number that is known, as a gauge `fitune_NAME{run="..."}`. Raises RunDirectoryError where it cannot."""
    numbers = {name: value for name, value in asdict(sample).items() if isinstance(value, int | float)}
    if metrics is not None:
        numbers |= {name: getattr(metrics, name) for name in _STEP_NUMBERS}
    write_atomically(path, "".join(_lines(run_name, numbers)))


def _lines(run_name: str, numbers: dict[str, int | float]) -> Iterator[str]:
    label = run_name.replace("\\", r"\\").replace('"', r"\"")
    for name, value in numbers.items():
        yield f'# TYPE fitune_{name} gauge\nfitune_{name}{{run="{label}"}} {value}\n'
