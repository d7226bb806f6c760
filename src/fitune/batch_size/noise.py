"""The gradient noise of a run, measured from what its steps compute anyway.

A step over micro-batches i = 1..a with loss weights n_i (supervised tokens), N = sum n_i, w_i = n_i / N adds
c_i = w_i g_i to the gradient. With q_i = |c_i|^2, Q = |sum c_i|^2 before clipping and W2 = sum w_i^2

    signal    U = (Q - sum q_i) / (1 - W2)    unbiased for |G|^2, the squared norm of the true gradient
    variance  v = Q - U                       unbiased for the variance of the step's gradient;  T = v N per token

for any weights and any noise that is independent between micro-batches: U is the weighted mean of g_i . g_j, i != j.
For equal weights it is the estimator of McCandlish et al. 2018 (arXiv 1812.06162, appendix A); the usual formulas
assume equal sizes, which micro-batches of real rows never have.

Single values are far too noisy to use. They are averaged over tokens, numerator and denominator apart (the mean of
ratios is not the ratio of means), and never cut at zero. From the averages follow the ratio of noise to signal of a
step of N tokens, rho = T / (N U), and the batch at which both are equal, the noise scale T / U in tokens.

A step of one micro-batch has no pairs. There |G|^2 is estimated by g_t . m_(t-1), where m is Adam's average of earlier
gradients, independent of this step's noise. The same product measures whether the run still descends: the bounce ratio
tau = mean(g . m) / mean(U) is about 1 while successive steps agree and 0 or less once they bounce around a minimum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fitune.batch_size.norms import GradientNorms

HALF_LIFE_FRACTION = 0.02
"""Of the run's tokens: how long an average remembers."""
FEWEST_HALF_LIFE_STEPS = 8
PRECONDITIONED_EVERY = 50
"""Steps between two readings of the weighted norms, which cost a second look at each gradient."""
LARGE_SHARE = 0.05
"""A step that holds more of the data than this is noticeably less noisy than one drawn with replacement."""
Z = 1.645
"""Of a one-sided bound at 95 %."""


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """One step: signal U, variance T (per token), both in squared gradient units; tokens N."""

    signal: float
    variance: float
    tokens: float


def pairwise_sample(
    squared_norms: Sequence[float], total_squared_norm: float, *, weights: Sequence[float]
) -> NoiseSample | None:
    """squared_norms: q_i of each micro-batch's own contribution to the gradient. total_squared_norm: Q of their sum,
    before clipping. weights: n_i. None with fewer than two micro-batches that have a target, or a number not finite."""
    tokens = sum(weights)
    pairs = 1 - sum((weight / tokens) ** 2 for weight in weights) if tokens else 0.0
    if sum(weight > 0 for weight in weights) < 2:
        return None
    signal = (total_squared_norm - math.fsum(squared_norms)) / pairs
    return _finite(NoiseSample(signal, (total_squared_norm - signal) * tokens, tokens))


def momentum_sample(dot: float, total_squared_norm: float, *, tokens: float) -> NoiseSample | None:
    """dot: g_t . m_(t-1), the bias of Adam's m corrected. None where a number is not finite."""
    return _finite(NoiseSample(dot, (total_squared_norm - dot) * tokens, tokens))


@dataclass(frozen=True, slots=True)
class NoiseAverages:
    """Averages over the run so far, weighted by tokens and halved every half-life; JSON numbers, so that a checkpoint
    holds them as they are. weight and squared_weight give the effective number of steps; *_spread are variances.
    momentum_gain: by how much Adam's average is smaller than the gradient that it averages, since it starts at zero
    and takes clipped gradients."""

    weight: float = 0.0
    squared_weight: float = 0.0
    signal: float = 0.0
    variance: float = 0.0
    signal_spread: float = 0.0
    variance_spread: float = 0.0
    dot_weight: float = 0.0
    dot: float = 0.0
    dot_spread: float = 0.0
    momentum_gain: float = 0.0

    @property
    def effective_steps(self) -> float:
        return self.weight**2 / self.squared_weight if self.squared_weight else 0.0


def update_averages(
    averages: NoiseAverages,
    sample: NoiseSample,
    *,
    half_life_tokens: float,
    dot: float | None = None,
) -> NoiseAverages:
    """dot: g_t . m_(t-1) of the step, for tau; None before Adam has a memory."""
    decay = 0.5 ** (sample.tokens / half_life_tokens)
    weight = decay * averages.weight + sample.tokens
    share = sample.tokens / weight
    signal_step, variance_step = (
        sample.signal - averages.signal,
        sample.variance - averages.variance,
    )
    updated = replace(
        averages,
        weight=weight,
        squared_weight=decay**2 * averages.squared_weight + sample.tokens**2,
        signal=averages.signal + share * signal_step,
        variance=averages.variance + share * variance_step,
        signal_spread=(1 - share) * (averages.signal_spread + share * signal_step**2),
        variance_spread=(1 - share) * (averages.variance_spread + share * variance_step**2),
    )
    if dot is None or not math.isfinite(dot):
        return updated
    dot_weight = decay * averages.dot_weight + sample.tokens
    return replace(
        updated,
        dot_weight=dot_weight,
        dot=averages.dot + sample.tokens / dot_weight * (dot - averages.dot),
    )


def observe(
    averages: NoiseAverages,
    norms: GradientNorms,
    *,
    half_life_tokens: float,
    beta1: float,
    clip: float,
) -> NoiseAverages:
    """Take in a step. beta1, clip: that the step was done with; its own average comes after the product was taken."""
    dot = norms.momentum_dot
    if dot is not None:
        dot = dot / averages.momentum_gain if averages.momentum_gain > 0 else None
    sample = pairwise_sample(norms.micro, norms.total, weights=norms.weights)
    if sample is None and dot is not None:
        sample = momentum_sample(dot, norms.total, tokens=sum(norms.weights))
    if sample is not None:
        averages = update_averages(averages, sample, half_life_tokens=half_life_tokens, dot=dot)
    kept = min(1.0, clip / (math.sqrt(norms.total) + 1e-6)) if clip else 1.0
    return replace(averages, momentum_gain=beta1 * averages.momentum_gain + (1 - beta1) * kept)


def observe_preconditioned(
    averages: NoiseAverages, norms: GradientNorms, *, half_life_tokens: float
) -> NoiseAverages:
    """The same averages of squares weighted as Adam weighs them; unchanged by a step without any, as the first is."""
    if norms.preconditioned_micro is None or not norms.preconditioned_total:
        return averages
    sample = pairwise_sample(
        norms.preconditioned_micro, norms.preconditioned_total, weights=norms.weights
    )
    return (
        averages
        if sample is None
        else update_averages(averages, sample, half_life_tokens=half_life_tokens)
    )


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """scale_tokens: the noise scale, with one-sided 95 % bounds; None where the signal is not known to be above zero,
    inf where it may be zero. bounce: tau, 1 or -1 where only its sign is known, None where not even that.
    effective_steps: how many steps these rest on."""

    signal: float
    variance: float
    scale_tokens: float | None
    scale_low_tokens: float
    scale_high_tokens: float
    bounce: float | None
    effective_steps: float

    def ratio(self, step_tokens: float, *, data_tokens: float | None = None) -> float | None:
        """rho, noise over signal, of a step of that many tokens. data_tokens: of the whole set, from which a step
        draws without replacement: where it holds much of the set, its noise is smaller by the share left."""
        if self.scale_tokens is None:
            return None
        share = 0.0 if data_tokens is None else step_tokens / data_tokens
        left = 1.0 if share < LARGE_SHARE else max(0.0, 1 - share)
        return self.scale_tokens / step_tokens * left


def estimate(averages: NoiseAverages) -> NoiseEstimate | None:
    """None before the second step, of which a spread is known."""
    steps = averages.effective_steps
    if steps < 1.5:
        return None
    signal, variance = averages.signal, averages.variance
    signal_error = Z * math.sqrt(averages.signal_spread / (steps - 1))
    variance_error = Z * math.sqrt(averages.variance_spread / (steps - 1))
    surest_signal = signal - signal_error
    bounce = None
    if averages.dot_weight and surest_signal > 0:
        bounce = averages.dot / signal
    elif abs(averages.dot) > Z * math.sqrt(averages.dot_spread / (steps - 1)):
        bounce = math.copysign(1.0, averages.dot)  # only the sign is known
    return NoiseEstimate(
        signal=signal,
        variance=variance,
        scale_tokens=max(variance, 0.0) / signal if signal > 0 else None,
        scale_low_tokens=max(variance - variance_error, 0.0) / (signal + signal_error)
        if signal + signal_error > 0
        else 0.0,
        scale_high_tokens=(variance + variance_error) / surest_signal
        if surest_signal > 0
        else math.inf,
        bounce=bounce,
        effective_steps=steps,
    )


def noise_fields(
    averages: NoiseAverages, preconditioned: NoiseAverages, *, step_tokens: float
) -> dict[str, float | None]:
    """Of a step's metrics."""
    noise, weighted = estimate(averages), estimate(preconditioned)
    return {
        "noise_signal": None if noise is None else noise.signal,
        "noise_variance": None if noise is None else noise.variance,
        "noise_ratio": None if noise is None else noise.ratio(step_tokens),
        "noise_scale_tokens": None if noise is None else noise.scale_tokens,
        "noise_scale_preconditioned_tokens": None if weighted is None else weighted.scale_tokens,
        "noise_bounce": None if noise is None else noise.bounce,
    }


def _finite(sample: NoiseSample) -> NoiseSample | None:
    return sample if math.isfinite(sample.signal) and math.isfinite(sample.variance) else None
