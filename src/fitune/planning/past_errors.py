"""What earlier runs on this machine took beside what had been predicted for them, kept in the user's cache.

A run's self-check adds a line. Later predictions of the same model, on the same device with the same driver and torch,
widen their interval by these lines and say so; the prediction itself is never corrected by them. What the CUDA context
was measured to take stands in for the catalogue's interval.
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

KEPT = 200
METHOD = 2
"""Of predicting and measuring the checked step; raised where either changes."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """device: its name. driver: of a card NVIDIA's version, of the CPU the C allocator. model: the last part of its
    source."""

    device: str
    driver: str
    torch: str
    model: str


@dataclass(frozen=True, slots=True)
class Residual:
    """What one step reserved (on a CPU: kept resident), and its prediction. context_bytes: what the process had on the
    card besides, None where that cannot be told."""

    circumstances: Circumstances
    predicted_bytes: int
    measured_bytes: int
    context_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_bytes / self.predicted_bytes


def circumstances(device: Device, model_source: str) -> Circumstances:
    driver = allocator_name() if device.kind == "cpu" else driver_version() or "unknown"
    return Circumstances(device.name, driver, version("torch"), Path(model_source).name)


def read_residuals(wanted: Circumstances) -> tuple[Residual, ...]:
    """Those of earlier runs under the same circumstances, oldest first; damaged lines are passed over."""
    return tuple(residual for residual in _residuals() if residual.circumstances == wanted)


def measured_context(here: Circumstances) -> ContextPrior | None:
    """The CUDA context as earlier runs found it with this device, driver and torch, whatever their model; the latest is
    the expected one. None where none of them could tell."""
    found = [
        residual.context_bytes
        for residual in _residuals()
        if residual.context_bytes is not None and replace(residual.circumstances, model=here.model) == here
    ]
    return ContextPrior(min(found), found[-1], max(found)) if found else None


def add_residual(residual: Residual) -> None:
    """Keeps the latest 200 of all. A cache that cannot be written is left as it is: the run's own files hold both
    sides too."""
    path, made_by = _path(), _made_by()
    kept = [*_residuals(), residual][-KEPT:]
    beside = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(each) | {"made_by": made_by}) for each in kept)
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        beside.replace(path)


def widen(interval: Interval, residuals: tuple[Residual, ...], *, reserved_bytes: int) -> Interval:
    """The interval with what these runs, one or more, needed more or less than their predictions."""
    ratios = [residual.ratio for residual in residuals]
    lowest, highest = min(ratios), max(ratios)
    if len(ratios) == 1:
        reason = f"an earlier run of this model here differed from its prediction by {lowest - 1:+.1%}"
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
    return Path(os.environ.get("FITUNE_CACHE") or platformdirs.user_cache_path("fitune")) / "residuals.jsonl"


def _residuals() -> Iterator[Residual]:
    try:
        lines = _path().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    made_by = _made_by()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            content = parse_json(line)
            if content["made_by"] != made_by:
                continue  # the error of another version's predictions tells nothing of this one's
            predicted, measured = int(content["predicted_bytes"]), int(content["measured_bytes"])
            context = content.get("context_bytes")
            if predicted > 0 and measured > 0:
                kept = Circumstances(**content["circumstances"])
                yield Residual(kept, predicted, measured, None if context is None else int(context))
