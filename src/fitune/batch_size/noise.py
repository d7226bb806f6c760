"""Estimates the gradient noise of a run from norms that its steps measure anyway.

A step over micro-batches i = 1..a with loss weights n_i (supervised tokens), N = sum n_i, w_i = n_i
/ N adds c_i = w_i g_i to the gradient. With q_i = |c_i|^2, Q = |sum c_i|^2 before clipping and W2 =
sum w_i^2

    signal    U = (Q - sum q_i) / (1 - W2)    unbiased for |G|^2, G being the true gradient
    variance  v = Q - U                       unbiased for the variance of the step's gradient;
                                              T = v N per token

for any weights, and for any noise that is independent between micro-batches: U is the weighted mean
of g_i . g_j over i != j. For equal weights it is the estimator of McCandlish et al. 2018 (arXiv
1812.06162, appendix A). The usual formulas assume equal sizes, which micro-batches of real samples
never have.

Single values are far too noisy to use. They are averaged over tokens, with numerator and
denominator apart (the mean of ratios is not the ratio of means), and never clamped at zero. The
averages give the ratio of noise to signal of a step of N tokens, rho = T / (N U), and the batch at
which both are equal, the noise scale T / U in tokens.

A step of one micro-batch has no pairs. Its |G|^2 is estimated by g_t . m_(t-1), where m is Adam's
average of earlier gradients, which is independent of this step's noise. The same product shows
whether the run still descends: the bounce ratio tau = mean(g . m) / mean(U) is about 1 while
successive steps agree, and 0 or less once they bounce around a minimum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fitune.batch_size.norms import GradientNorms

#: the half-life of the averages, as a fraction of the run's tokens
HALF_LIFE_FRACTION = 0.02
FEWEST_HALF_LIFE_STEPS = 8
#: Steps between two measurements of the preconditioned norms, which read each gradient once more.
PRECONDITIONED_EVERY = 50
#: A step with a larger fraction of the data than this is noticeably less noisy than a step drawn
#: with replacement.
LARGE_SHARE = 0.05
#: for a one-sided bound at 95 %
Z = 1.645


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """The noise of one step: signal U and variance T per token, in squared gradient units."""

    signal: float
    variance: float
    #: N, the loss weight of the step
    tokens: float


def pairwise_sample(
    squared_norms: Sequence[float], total_squared_norm: float, *, weights: Sequence[float]
) -> NoiseSample | None:
    """Estimate the noise from the norms of micro-batches.

    squared_norms: q_i of each micro-batch's own contribution to the gradient.
    total_squared_norm: Q of their sum, before clipping.
    weights: n_i.

    Returns None if fewer than two micro-batches have a target, or if a number is not finite.
    """
    tokens = sum(weights)
    pairs = 1 - sum((weight / tokens) ** 2 for weight in weights) if tokens else 0.0
    if sum(weight > 0 for weight in weights) < 2:
        return None
    signal = (total_squared_norm - math.fsum(squared_norms)) / pairs
    return _finite(NoiseSample(signal, (total_squared_norm - signal) * tokens, tokens))


def momentum_sample(dot: float, total_squared_norm: float, *, tokens: float) -> NoiseSample | None:
    """Estimate the noise of a step of one micro-batch from Adam's average of earlier gradients.

    dot: g_t . m_(t-1), with the bias of m corrected.

    Returns None if a number is not finite.
    """
    return _finite(NoiseSample(dot, (total_squared_norm - dot) * tokens, tokens))


@dataclass(frozen=True, slots=True)
class NoiseAverages:
    """Averages over the run so far, weighted by tokens and with a half-life.

    The fields are JSON numbers, so a checkpoint stores them as they are.
    """

    #: with `squared_weight` it gives the effective number of steps
    weight: float = 0.0
    squared_weight: float = 0.0
    signal: float = 0.0
    variance: float = 0.0
    #: variances of the averaged values
    signal_spread: float = 0.0
    variance_spread: float = 0.0
    #: of g . m, which is averaged over fewer steps
    dot_weight: float = 0.0
    dot: float = 0.0
    dot_spread: float = 0.0
    #: by which factor Adam's average is smaller than the gradients that it averages, since it
    #: starts at zero and averages clipped gradients
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
    """Add a step to the averages.

    dot: g_t . m_(t-1) of the step, for tau; None as long as Adam has no average.
    """
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
    """Add the norms of a step to the averages.

    beta1, clip: of the step. Its own gradient enters Adam's average after the product was computed.
    """
    dot = norms.momentum_dot
    if dot is not None:
        dot = dot / averages.momentum_gain if averages.momentum_gain > 0 else None
    sample = pairwise_sample(norms.micro, norms.total, weights=norms.weights)
    if sample is None and dot is not None:
        sample = momentum_sample(dot, norms.total, tokens=sum(norms.weights))
    if sample is not None:
        averages = update_averages(averages, sample, half_life_tokens=half_life_tokens, dot=dot)
    clip_factor = min(1.0, clip / (math.sqrt(norms.total) + 1e-6)) if clip else 1.0
    return replace(
        averages, momentum_gain=beta1 * averages.momentum_gain + (1 - beta1) * clip_factor
    )


def observe_preconditioned(
    averages: NoiseAverages, norms: GradientNorms, *, half_life_tokens: float
) -> NoiseAverages:
    """Add a step to the averages of norms whose squares are weighted as Adam weighs them.

    Returns the averages unchanged if the step has no such norms.
    """
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
    """What the averages say about the gradient noise."""

    signal: float
    variance: float
    #: the noise scale; None if the signal is not positive
    scale_tokens: float | None
    #: one-sided 95 % bounds of the noise scale; the upper one is inf if the signal may be zero
    scale_low_tokens: float
    scale_high_tokens: float
    #: tau; 1 or -1 if only its sign is known, None if not even that
    bounce: float | None
    #: how many steps the averages rest on
    effective_steps: float

    def ratio(self, step_tokens: float, *, data_tokens: float | None = None) -> float | None:
        """Return rho, noise over signal, of a step of that many tokens.

        data_tokens: of the whole training data, which a step draws from without replacement. The
            noise of a step that holds much of the data is smaller by the fraction that remains.
        """
        if self.scale_tokens is None:
            return None
        share = 0.0 if data_tokens is None else step_tokens / data_tokens
        left = 1.0 if share < LARGE_SHARE else max(0.0, 1 - share)
        return self.scale_tokens / step_tokens * left


def estimate(averages: NoiseAverages) -> NoiseEstimate | None:
    """Return the estimate, or None before the second step, from which on a spread is known."""
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
    averages: NoiseAverages,
    preconditioned: NoiseAverages,
    *,
    step_tokens: float,
    tokens_per_weight: float = 1.0,
) -> dict[str, float | None]:
    """Return the noise as fields of a step's metrics.

    step_tokens: the loss weight of the step.
    tokens_per_weight: the supervised tokens for each unit of the loss weight.
    """
    noise, weighted = estimate(averages), estimate(preconditioned)

    def in_tokens(value: float | None) -> float | None:
        return None if value is None else value * tokens_per_weight

    return {
        "noise_signal": None if noise is None else noise.signal,
        "noise_variance": None if noise is None else in_tokens(noise.variance),
        "noise_ratio": None if noise is None else noise.ratio(step_tokens),
        "noise_scale_tokens": None if noise is None else in_tokens(noise.scale_tokens),
        "noise_scale_preconditioned_tokens": (
            None if weighted is None else in_tokens(weighted.scale_tokens)
        ),
        "noise_bounce": None if noise is None else noise.bounce,
    }


def _finite(sample: NoiseSample) -> NoiseSample | None:
    return sample if math.isfinite(sample.signal) and math.isfinite(sample.variance) else None
