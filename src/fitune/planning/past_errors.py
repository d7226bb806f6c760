"""Stores how far the predictions of earlier runs on this machine were off, in the user's cache.

A run's self-check adds a line. Later predictions of the same model, on the same device with the
same driver and torch, widen their interval by these errors and say so; the prediction itself is
never corrected by them. The measured size of the CUDA context replaces the catalogue's interval.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import platformdirs

from fitune import __version__
from fitune.allocator.prediction import Interval
from fitune.boundary import parse_json
from fitune.machine.cards import ContextPrior, Device
from fitune.machine.environment import driver_version
from fitune.machine.libc import allocator_name

#: the most lines that are stored
KEPT = 200
#: increased whenever the way to predict or to measure the checked step changes
METHOD = 2


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What must be equal for the error of one run to say something about another."""

    #: the name of the device
    device: str
    #: the version of NVIDIA's driver, or the C allocator on a CPU
    driver: str
    torch: str
    #: the last part of the model's source
    model: str


@dataclass(frozen=True, slots=True)
class Residual:
    """The memory that one step reserved (on a CPU: that was resident), and its prediction."""

    circumstances: Circumstances
    predicted_bytes: int
    measured_bytes: int
    #: what the process held on the card outside of PyTorch; None where that cannot be measured
    context_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_bytes / self.predicted_bytes


def circumstances(device: Device, model_source: str) -> Circumstances:
    driver = allocator_name() if device.kind == "cpu" else driver_version() or "unknown"
    return Circumstances(device.name, driver, version("torch"), Path(model_source).name)


def read_residuals(wanted: Circumstances) -> tuple[Residual, ...]:
    """Return the errors of earlier runs under the same circumstances, oldest first.

    Damaged lines are skipped.
    """
    return tuple(residual for residual in _residuals() if residual.circumstances == wanted)


def measured_context(here: Circumstances) -> ContextPrior | None:
    """Return the size of the CUDA context as earlier runs measured it.

    Runs with the same device, driver and torch count, whatever their model; the latest one gives
    the expected size. Returns None where no run could measure it.
    """
    found = [
        residual.context_bytes
        for residual in _residuals()
        if residual.context_bytes is not None
        and replace(residual.circumstances, model=here.model) == here
    ]
    return ContextPrior(min(found), found[-1], max(found)) if found else None


def add_residual(residual: Residual) -> None:
    """Add the error of a run, and drop the oldest lines beyond 200.

    A cache that cannot be written remains as it is: the run's own files contain the prediction and
    the measurement too.
    """
    path, made_by = _path(), _made_by()
    remaining = [*_residuals(), residual][-KEPT:]
    unfinished = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(each) | {"made_by": made_by}) for each in remaining)
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        unfinished.replace(path)


def widen(interval: Interval, residuals: tuple[Residual, ...], *, reserved_bytes: int) -> Interval:
    """Return the interval widened by the largest errors of these runs (at least one).

    reserved_bytes: the predicted reserved memory, to which the errors are relative.
    """
    ratios = [residual.ratio for residual in residuals]
    lowest, highest = min(ratios), max(ratios)
    if len(ratios) == 1:
        reason = (
            f"an earlier run of this model here differed from its prediction by {lowest - 1:+.1%}"
        )
    else:
        reason = (
            f"{len(ratios)} earlier runs of this model here differed from their predictions by {lowest - 1:+.1%} to "
            f"{highest - 1:+.1%}"
        )
    return Interval(
        interval.low_bytes + int(reserved_bytes * min(lowest - 1, 0)),
        interval.high_bytes + int(reserved_bytes * max(highest - 1, 0)),
        (*interval.reasons, reason),
    )


def _made_by() -> str:
    return f"{__version__}, method {METHOD}"


def _path() -> Path:
    directory = os.environ.get("FITUNE_CACHE") or platformdirs.user_cache_path("fitune")
    return Path(directory) / "residuals.jsonl"


def _residuals() -> Iterator[Residual]:
    """Yield the errors that this version of fitune stored, oldest first."""
    try:
        lines = _path().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    made_by = _made_by()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            content = parse_json(line)
            # the errors of another version's predictions say nothing about this one's
            if content["made_by"] != made_by:
                continue
            predicted, measured = int(content["predicted_bytes"]), int(content["measured_bytes"])
            context = content.get("context_bytes")
            if predicted > 0 and measured > 0:
                then = Circumstances(**content["circumstances"])
                yield Residual(then, predicted, measured, None if context is None else int(context))
