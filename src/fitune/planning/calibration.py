"""What runs on this machine have measured beside their predicted time: corrects the level of later predictions."""

from pathlib import Path
from statistics import median
from typing import Any

from fitune.planning.cache import read_cached, write_cached
from fitune.planning.plan import Plan
from fitune.run.metrics import read_metrics

_MOST = 16.0
"""A factor beyond it, either way, is no matter of calibration: another program had the device."""
_WARM_UP_STEPS = 2
_FEWEST_STEPS = 5


def calibration_factor(device: str, model: str) -> float | None:
    """measured / predicted of the last run of that model on that device; None where none has run."""
    found: Any = read_cached("calibration", [device, model])
    return float(found) if isinstance(found, int | float) and 1 / _MOST <= found <= _MOST else None


def calibrate(plan: Plan, metrics: Path) -> None:
    """From the steps of a run that followed the plan; nothing where they are too few to tell."""
    predicted = None if plan.chosen is None else plan.candidates[plan.chosen].predicted_seconds_per_step
    steps = read_metrics(metrics).steps[_WARM_UP_STEPS:]
    if predicted is None or len(steps) < _FEWEST_STEPS:
        return
    measured = median(step.seconds / step.tokens for step in steps) * plan.data["tokens_per_step"]
    known = calibration_factor(plan.device.name, plan.model.name) or 1.0  # the prediction has it in it
    write_cached("calibration", [plan.device.name, plan.model.name], known * measured / predicted)
