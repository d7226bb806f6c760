"""The learning rate as a function of the share of the run that is done, so that it is the same for every split of the
same tokens into steps or micro-batches."""

import math

from fitune.config import OptimConfig

WSD_DECAY_FRACTION = 0.1
"""Share of the run over which warm-up-stable-decay falls at its end (Hägele et al. 2024, arXiv 2405.18392)."""


def lr_factor(optim: OptimConfig, progress: float) -> float:
    """The share of optim.lr in use at `progress`, the share (0 to 1) of the run's tokens seen in the *middle* of the
    step, so that neither the first step of a warm-up nor the last one of a decay is done with a rate of 0."""
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
