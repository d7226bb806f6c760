"""Computes the learning rate from the fraction of the run that is done.

So the rate does not depend on how tokens are split into steps or micro-batches.
"""

import math

from fitune.config import OptimConfig

#: The last fraction of the run, in which warm-up-stable-decay decays (Hägele et al. 2024,
#: arXiv 2405.18392).
WSD_DECAY_FRACTION = 0.1


def lr_factor(optim: OptimConfig, progress: float) -> float:
    """Return the factor of optim.lr at `progress`.

    progress: the fraction (0 to 1) of the run's tokens seen in the *middle* of the step, so that
        neither the first step of a warm-up nor the last one of a decay has a rate of 0.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < optim.warmup:
        return progress / optim.warmup
    rest = (progress - optim.warmup) / (1 - optim.warmup) if optim.warmup < 1 else 0.0
    final = optim.final_lr_fraction
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - final) * rest
        case "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * rest))
        case "wsd":
            decayed = max(0.0, progress - (1 - WSD_DECAY_FRACTION)) / WSD_DECAY_FRACTION
            return 1 - (1 - final) * decayed
