"""Writes a run's present numbers for Prometheus.

The file has the exposition format (https://prometheus.io/docs/instrumenting/exposition_formats/)
and is read by node_exporter's textfile collector.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fitune.errors import ConfigError, RunDirectoryError
from fitune.plain_files import read_plain
from fitune.run.files import check_directory, write_atomically
from fitune.run.memory import MemorySample
from fitune.run.metrics import StepMetrics

_START = b"# TYPE fitune_"
_STEP_NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_second", "total_tokens")


def check_prometheus(path: Path) -> None:
    """Raise ConfigError if the file exists and was not written here, since it would be replaced.

    Raises RunDirectoryError if its directory is missing or cannot be written to.
    """
    if (fault := _not_ours(path)) is not None:
        raise ConfigError(
            [f"run.prometheus {path} {fault}: give the file of another name, which is written anew"]
        )
    if not path.parent.exists():
        raise RunDirectoryError(
            f"{path.parent} does not exist, and run.prometheus is written there: make it, or change run.prometheus"
        )
    check_directory(path.parent, key="run.prometheus")


def _not_ours(path: Path) -> str | None:
    """Return why the file must not be replaced; None if it is missing, empty, or fitune's."""
    try:
        content = read_plain(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be replaced ({error.strerror})"
    return (
        None
        if not content or content.startswith(_START)
        else "exists and was not written by fitune"
    )


def write_prometheus(
    path: Path, run_name: str, *, sample: MemorySample, metrics: StepMetrics | None
) -> None:
    """Write every known number as a gauge `fitune_NAME{run="..."}`.

    Raises RunDirectoryError if the file cannot be written or is no longer one that was written
    here.
    """
    if (fault := _not_ours(path)) is not None:
        raise RunDirectoryError(f"run.prometheus {path} {fault}")
    numbers = {
        name: value for name, value in asdict(sample).items() if isinstance(value, int | float)
    }
    if metrics is not None:
        numbers |= {name: getattr(metrics, name) for name in _STEP_NUMBERS}
    write_atomically(path, "".join(_lines(run_name, numbers)))


def _lines(run_name: str, numbers: dict[str, int | float]) -> Iterator[str]:
    label = run_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    for name, value in numbers.items():
        yield f'# TYPE fitune_{name} gauge\nfitune_{name}{{run="{label}"}} {value}\n'
