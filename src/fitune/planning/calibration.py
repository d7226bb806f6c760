"""Corrects predicted times by the measured times of earlier runs on this machine."""

from pathlib import Path
from statistics import median

from fitune.planning.cache import read_cached, write_cached
from fitune.planning.plan import Plan
from fitune.run.metrics import read_metrics

#: a run that was slower or faster by more than this factor does not count: another program must
#: have used the device
_MOST = 16.0
_WARM_UP_STEPS = 2
_FEWEST_STEPS = 5


def calibration_factor(device: str, model: str) -> float | None:
    """Return measured / predicted time of the model's last run on the device; None without one."""
    found: object = read_cached("calibration", [device, model])
    return float(found) if isinstance(found, int | float) and 1 / _MOST <= found <= _MOST else None


def calibrate(plan: Plan, metrics: Path) -> None:
    """Store the measured / predicted time of a run that followed the plan.

    Does nothing if the run had too few steps.
    """
    predicted = (
        None if plan.chosen is None else plan.candidates[plan.chosen].predicted_seconds_per_step
    )
    steps = read_metrics(metrics).steps[_WARM_UP_STEPS:]
    if predicted is None or len(steps) < _FEWEST_STEPS:
        return
    measured = median(step.seconds / step.tokens for step in steps) * plan.data["tokens_per_step"]
    # the plan's prediction was already corrected by the factor of the run before
    known = calibration_factor(plan.device.name, plan.model.name) or 1.0
    write_cached("calibration", [plan.device.name, plan.model.name], known * measured / predicted)
