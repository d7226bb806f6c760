"""Fewer points of a curve, with every minimum and maximum kept: a peak must never disappear from a picture."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt


def thin(values: npt.NDArray[np.float64], max_points: int) -> npt.NDArray[np.int64]:
    """Indices, in order, of at most `max_points` (>= 4) values: the first, the last, and of each of equal stretches
    its smallest and its largest. nan is never one of these; infinite values are."""
    num_values = len(values)
    if num_values <= max_points:
        return np.arange(num_values)
    edges = np.linspace(0, num_values, (max_points - 2) // 2 + 1).astype(np.int64)
    kept = {0, num_values - 1}
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    for start, end in pairwise(edges):
        kept.add(int(start + low[start:end].argmin()))
        kept.add(int(start + high[start:end].argmax()))
    return np.array(sorted(kept), dtype=np.int64)


def thin_all(columns: list[npt.NDArray[np.float64]], max_points: int) -> npt.NDArray[np.int64]:
    """Indices that keep the extremes of each of several columns that share an axis."""
    if not columns:
        return np.arange(0)
    share = max(max_points // len(columns), 4)
    return np.unique(np.concatenate([thin(column, share) for column in columns]))
