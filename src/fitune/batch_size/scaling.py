"""Scales the optimizer's settings to another effective batch, all of them from one gain.

For a batch k times as large, and noise of rho times the signal at the old batch,

    r(k) = (1 + rho) / (1 + rho / k)

is how much farther one step may go: k if the gradient is all noise, 1 if it has none. It is
AdaScale's gain (Johnson et al. 2020, arXiv 2007.05105). Adam's rate grows by sqrt(r), because its
step is a ratio of gradient and root mean square, and SGD's by r. Averages and weight decay, which
act per step, are held constant per token instead: beta -> beta^k, and weight decay by rate * decay
/ batch = const (Wang and Aitchison 2024, arXiv 2405.13698). eps changes by 1 / sqrt(k) (Malladi et
al. 2022, arXiv 2205.10287), and the clipping threshold by 1 / sqrt(r), since the norm of a less
noisy gradient is smaller.
"""

import math
from dataclasses import asdict, dataclass, replace

from fitune.config import Method, ObjectiveName, OptimConfig, Scaling
from fitune.optimizers.table import OPTIMIZERS

#: LoRA needs about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without
#: Regret").
DEFAULT_LR = {"full": 2e-5, "freeze": 2e-5, "lora": 2e-4, "qlora": 2e-4}
#: Losses of preferences move a trained model a little: TRL's DPOConfig has 1e-6 for full training.
PREFERENCE_LR_FACTOR = 0.05
#: The rate changes by at most this factor if the noise was not measured.
MOST_UNMEASURED = 2.0
#: If beta1 averages over more than this fraction of the remaining steps, it is scaled too.
LONGEST_LAG_FRACTION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSettings:
    """The settings of an optimizer that depend on the batch."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    #: the largest gradient norm; 0 for no clipping
    clip: float


def configured_lr(optim: OptimConfig, method: Method, objective: ObjectiveName) -> float:
    """Return optim.lr, for which auto is a default of the method and the objective."""
    if optim.lr != "auto":
        return optim.lr
    return DEFAULT_LR[method] * (1 if objective == "sft" else PREFERENCE_LR_FACTOR)


def settings_of(optim: OptimConfig, *, lr: float, rows: int) -> OptimSettings:
    """Return the settings for a batch of `rows` samples.

    They are as configured, or scaled from optim.reference_batch if optim.scaling says so.
    """
    given = OptimSettings(
        lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, clip=optim.clip
    )
    if optim.reference_batch is None:
        return given
    rho = None if optim.noise_scale is None else optim.noise_scale / optim.reference_batch
    return scale(
        given,
        optim.scaling,
        factor=rows / optim.reference_batch,
        rho=rho,
        adaptive=is_adaptive(optim),
    )


def with_settings(optim: OptimConfig, settings: OptimSettings) -> OptimConfig:
    return optim.model_copy(update=asdict(settings))


def scaling_note(optim: OptimConfig, settings: OptimSettings, *, lr: float, rows: int) -> str:
    """Return a message about what optim.scaling changed."""
    assert optim.reference_batch is not None
    measured = "" if optim.noise_scale is None else f", noise scale {optim.noise_scale:g} samples"
    return (
        f"{optim.scaling} from {optim.reference_batch} samples to {rows}{measured}: "
        f"rate {lr:.3g} -> {settings.lr:.3g}, "
        f"beta2 {optim.betas[1]:g} -> {settings.betas[1]:.4g}, weight decay {optim.weight_decay:g} -> "
        f"{settings.weight_decay:.3g}, clip {optim.clip:g} -> {settings.clip:.3g}"
    )


def is_adaptive(optim: OptimConfig) -> bool:
    """Return whether the optimizer divides the gradient by its own size."""
    return OPTIMIZERS[optim.name].is_adaptive


def gain(rho: float, factor: float) -> float:
    """Return r(k) for a batch that grows by `factor`.

    rho: noise over signal at the old batch; inf if there is nothing but noise.
    """
    return factor if math.isinf(rho) else (1 + rho) / (1 + rho / factor)


def rate_factor(rule: Scaling, factor: float, *, rho: float | None, adaptive: bool = True) -> float:
    """Return the factor by which the rate changes.

    rho: None if it was not measured; the rule sqrt_gain is then bounded.
    adaptive: for Adam and similar optimizers, not for SGD.
    """
    match rule:
        case "none":
            return 1.0
        case "linear":
            return factor
        case "sqrt":
            return math.sqrt(factor)
        case "sqrt_gain":
            if rho is not None:
                return math.sqrt(gain(rho, factor)) if adaptive else gain(rho, factor)
            power = math.sqrt(factor) if adaptive else factor
            return min(max(power, 1 / MOST_UNMEASURED), MOST_UNMEASURED)


def scale(
    reference: OptimSettings,
    rule: Scaling,
    *,
    factor: float,
    rho: float | None = None,
    adaptive: bool = True,
    steps_left: float | None = None,
) -> OptimSettings:
    """Scale settings to a batch `factor` times as large as the one that they were chosen for.

    steps_left: with the new batch, if known. beta1 stays as it is unless it would average over too
        many of them.
    """
    if rule == "none" or factor == 1:
        return reference
    change = rate_factor(rule, factor, rho=rho, adaptive=adaptive)
    beta1, beta2 = reference.betas
    lag = 1 / (1 - beta1)
    keep_beta1 = steps_left is None or lag <= LONGEST_LAG_FRACTION * steps_left
    return replace(
        reference,
        lr=reference.lr * change,
        betas=(beta1 if keep_beta1 else beta1**factor, beta2**factor),
        eps=reference.eps / math.sqrt(factor),
        weight_decay=reference.weight_decay * factor / change,
        clip=reference.clip / math.sqrt(_implied_gain(change, factor, rho=rho, adaptive=adaptive)),
    )


def _implied_gain(change: float, factor: float, *, rho: float | None, adaptive: bool) -> float:
    """Return the measured r(k), or the one that the change of the rate implies, between 1 and k."""
    implied = gain(rho, factor) if rho is not None else change ** (2 if adaptive else 1)
    return min(max(implied, min(1.0, factor)), max(1.0, factor))
