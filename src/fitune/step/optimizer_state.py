"""Allocates the optimizer's state before the first step, so that no later update has to.

Torch allocates it in the first update, parameter by parameter, when memory is fullest. A failure
there leaves some parameters updated and others without state (`KeyError: 'exp_avg_sq'` in the next
update).
"""

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW

from fitune.optimizers.hidden_matrices import HiddenMatrices

_STARTS_AT_ZERO = (Adam, AdamW, Adafactor, SGD, HiddenMatrices)


def create_state(optimizer: torch.optim.Optimizer) -> bool:
    """Allocate the state of every parameter, and return whether that was possible.

    It is not possible for an optimizer that is not known to start from zeros. The state is
    allocated by an update with a gradient of zeros and a rate of 0, one parameter at a time, so it
    takes the memory of one parameter's gradient. Afterwards the step counters are 0, and parameters
    and later updates are bit-exactly what they would have been. `.grad` must be None.
    """
    groups = optimizer.param_groups
    if not isinstance(optimizer, _STARTS_AT_ZERO) or any(
        group.get("dampening") for group in groups
    ):
        return False
    changed = ("lr", "weight_decay", "params")
    before = [{key: group[key] for key in changed if key in group} for group in groups]
    for group, values in zip(groups, before, strict=True):
        group.update({key: [] if key == "params" else 0.0 for key in values})
    try:
        for group, values in zip(groups, before, strict=True):
            for parameter in values["params"]:
                group["params"] = [parameter]  # an update would process all parameters of the group
                if parameter.requires_grad and not optimizer.state.get(parameter):
                    _create(optimizer, parameter)
            group["params"] = []
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)
    return True


def _create(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Allocate the state of this parameter, which the groups must contain alone."""
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except BaseException:
        # A later update would take an incomplete state for a complete one.
        optimizer.state.pop(parameter, None)
        raise
    finally:
        parameter.grad = None
    step = optimizer.state[parameter].get("step")
    if isinstance(step, Tensor):
        step.zero_()
