"""The optimizer's state made before the first step, so that no later update has to allocate it.

Torch makes it in the first update, parameter by parameter, when memory is at its fullest; a failure there leaves some
parameters moved and others without state (`KeyError: 'exp_avg_sq'` in the next update).
"""

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW

_STARTS_AT_ZERO = (Adam, AdamW, Adafactor, SGD)


def create_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state of every parameter exists now. False for an optimizer that is not known to start from zeros.

    An update with a gradient of zeros and a rate of 0, one parameter at a time, so it needs one parameter's gradient.
    Afterwards the counters are 0 and parameters and later updates the same, bit for bit. `.grad` must be None.
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
                group["params"] = [parameter]  # an update looks at all that are there
                if parameter.requires_grad and not optimizer.state.get(parameter):
                    _create(optimizer, parameter)
            group["params"] = []
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)
    return True


def _create(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """By an update of this parameter, the only one that the optimizer has."""
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except BaseException:
        optimizer.state.pop(
            parameter, None
        )  # a part of it, which a later update would take for the whole
        raise
    finally:
        parameter.grad = None
    step = optimizer.state[parameter].get("step")
    if isinstance(step, Tensor):
        step.zero_()
