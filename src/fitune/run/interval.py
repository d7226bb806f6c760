"""How sure a difference is: bootstrap intervals of paired differences.

Both runs saw the same held-out rows (or the same stretch of training data), so each row gives one difference, and what
makes rows easy or hard cancels. The interval is studentised (bootstrap-t, Efron and Tibshirani 1993, chapter 12): each
resample's mean is measured in its own standard error, which keeps the stated rate with few and with skewed rows, where
plain percentiles are too narrow. It covers which rows were held out; another seed of training is not in it.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
NUM_RESAMPLES = 1000
FEWEST_PAIRS = 5
_CHUNK = 200
"""Resamples at a time: 200 x 2,000 rows of float64 are 3 MiB."""


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """mean lies in [low, high] at the stated level; num_pairs: rows (or stretches) that it rests on."""

    mean: float
    low: float
    high: float
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
    """The weighted mean of `first - second`. None where there are fewer than five pairs of finite numbers and positive
    weight. The same numbers give the same interval (fixed seed)."""
    pairs = _pairs(first_N, second_N, weights_N)
    if pairs is None:
        return None
    differences, weights, mean, error = pairs
    num_pairs = len(differences)
    if error <= 1e-12 * max(
        1.0, abs(mean)
    ):  # every pair differs by the same: nothing is left to chance
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
    """Student's two-sided quantile, by the expansion of Fisher and Cornish to the second order (within 1 % from 4
    degrees of freedom on). An interval is never narrower: resamples of few rows know too little of their tails."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def differ(first_N: npt.ArrayLike, second_N: npt.ArrayLike, weights_N: npt.ArrayLike) -> bool:
    """Whether the means differ by more than two standard errors: the quick form, for many pairs of runs."""
    pairs = _pairs(first_N, second_N, weights_N)
    return pairs is not None and abs(pairs[2]) > 2 * pairs[3] + 1e-12


def _pairs(
    first_N: npt.ArrayLike, second_N: npt.ArrayLike, weights_N: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, float] | None:
    """(differences, weights, their weighted mean, its standard error) of what can be used. The error is that of a
    ratio, by the jackknife: a heavy row draws the mean to itself, so its residual counts for more."""
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
    """How far the mean of each of _CHUNK resamples lies from the mean, in its own standard errors."""
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
