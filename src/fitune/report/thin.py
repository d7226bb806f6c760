"""Reduces the points of a curve without losing its minima and maxima.

A peak must never disappear from a picture.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt


def thin(values: npt.NDArray[np.float64], max_points: int) -> npt.NDArray[np.int64]:
    """Return the indices, in order, of at most `max_points` (>= 4) values.

    These are the first, the last, and the smallest and the largest of each of equal stretches.
    Among the extremes nan does not count; infinite values do.
    """
    num_values = len(values)
    if num_values <= max_points:
        return np.arange(num_values)
    edges = np.linspace(0, num_values, (max_points - 2) // 2 + 1).astype(np.int64)
    chosen = {0, num_values - 1}
    low = np.where(np.isnan(values), np.inf, values)
    high = np.where(np.isnan(values), -np.inf, values)
    for start, end in pairwise(edges):
        chosen.add(int(start + low[start:end].argmin()))
        chosen.add(int(start + high[start:end].argmax()))
    return np.array(sorted(chosen), dtype=np.int64)


def thin_all(columns: list[npt.NDArray[np.float64]], max_points: int) -> npt.NDArray[np.int64]:
    """Return indices that preserve the extremes of each of several columns with a common axis."""
    if not columns:
        return np.arange(0)
    share = max(max_points // len(columns), 4)
    return np.unique(np.concatenate([thin(column, share) for column in columns]))
