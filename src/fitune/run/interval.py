"""Computes how certain a difference is: bootstrap intervals of paired differences.

Both runs saw the same held-out samples (or the same part of the training data), so each sample
gives one difference, and what makes samples easy or hard cancels. The interval is studentised
(bootstrap-t, Efron and Tibshirani 1993, chapter 12): each resample's mean is measured in its own
standard errors. So the interval has the stated coverage with few or skewed samples, for which plain
percentiles are too narrow. It covers the choice of held-out samples, not another seed of the
training.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
NUM_RESAMPLES = 1000
FEWEST_PAIRS = 5
#: Resamples that are drawn at a time: 200 x 2,000 samples in float64 are 3 MiB.
_CHUNK = 200


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """An interval, [low, high], that contains the mean at the stated level."""

    mean: float
    low: float
    high: float
    #: the samples (or parts of the training data) that it rests on
    num_pairs: int
    level: float = LEVEL

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is more than chance."""
        return self.low > 0 or self.high < 0


def paired_interval(
    first_N: npt.ArrayLike,
    second_N: npt.ArrayLike,
    weights_N: npt.ArrayLike,
    *,
    level: float = LEVEL,
) -> ConfidenceInterval | None:
    """Return the interval of the weighted mean of `first - second`.

    Returns None for fewer than five pairs of finite numbers with positive weight. The same numbers
    give the same interval (fixed seed).
    """
    pairs = _pairs(first_N, second_N, weights_N)
    if pairs is None:
        return None
    differences, weights, mean, error = pairs
    num_pairs = len(differences)
    # If every pair has the same difference, there is no uncertainty.
    if error <= 1e-12 * max(1.0, abs(mean)):
        return ConfidenceInterval(mean, mean, mean, num_pairs, level)
    draw = np.random.default_rng(20260)
    ratios = np.concatenate(
        [_resampled_t(differences, weights, draw) for _ in range(0, NUM_RESAMPLES, _CHUNK)]
    )
    low, high = np.quantile(ratios[np.isfinite(ratios)], ((1 - level) / 2, (1 + level) / 2))
    least = _student(weights.sum() ** 2 / (weights**2).sum() - 1, level)
    return ConfidenceInterval(
        mean,
        mean - max(float(high), least) * error,
        mean - min(float(low), -least) * error,
        num_pairs,
        level,
    )


def _student(freedom: float, level: float) -> float:
    """Return Student's two-sided quantile by the second-order Fisher-Cornish expansion.

    It is exact within 1 % from 4 degrees of freedom on. An interval is never narrower than this,
    because resamples of few samples contain too little of the tails.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def differ(first_N: npt.ArrayLike, second_N: npt.ArrayLike, weights_N: npt.ArrayLike) -> bool:
    """Return whether the means differ by more than two standard errors.

    This is the fast form, for many pairs of runs.
    """
    pairs = _pairs(first_N, second_N, weights_N)
    return pairs is not None and abs(pairs[2]) > 2 * pairs[3] + 1e-12


def _pairs(
    first_N: npt.ArrayLike, second_N: npt.ArrayLike, weights_N: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, float] | None:
    """Return the usable differences and weights, their weighted mean, and its standard error.

    The error is that of a ratio, by the jackknife: a sample with a large weight pulls the mean
    towards itself, so its residual counts for more.
    """
    differences, weights = (
        np.asarray(first_N, float) - np.asarray(second_N, float),
        np.asarray(weights_N, float),
    )
    used = np.isfinite(differences) & (weights > 0)
    differences, weights = differences[used], weights[used]
    num_pairs = len(differences)
    if num_pairs < FEWEST_PAIRS:
        return None
    mean = float(np.average(differences, weights=weights))
    shares = weights / weights.sum()
    errors = shares * (differences - mean) / np.maximum(1 - shares, 1e-9)
    return (
        differences,
        weights,
        mean,
        float(np.sqrt((errors**2).sum() * (num_pairs - 1) / num_pairs)),
    )


def _resampled_t(
    differences: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    draw: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return how far the means of _CHUNK resamples are from the mean, in their standard errors."""
    mean = float(np.average(differences, weights=weights))
    num_pairs = len(differences)
    picks = draw.integers(0, num_pairs, (_CHUNK, num_pairs))
    w, d = weights[picks], differences[picks]
    total = w.sum(1)
    means = (w * d).sum(1) / total
    errors = np.sqrt(((w * (d - means[:, None])) ** 2).sum(1) * num_pairs / (num_pairs - 1)) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        found: npt.NDArray[np.float64] = (means - mean) / errors
    return found
