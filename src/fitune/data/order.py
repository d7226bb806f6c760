"""Compute pseudo-random orders that are functions of their key alone.

No random number generator has state here: an order, and a position in it, can be computed again
after any restart, on any machine and with any version of NumPy, whose own generators may change
their streams between releases.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(values_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64, a bijection of 64-bit integers that scatters them.

    Source: Steele, Lea and Flood, 2014.
    """
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_N ^ (values_N >> np.uint64(31))


def shuffled(num: int, *key: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(num) that depends on the key's integers alone, int64 [num]."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = mix(state + np.array([(word * _GOLDEN + _GOLDEN) & _MASK], np.uint64))
    keys_N = mix(state + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(keys_N, kind="stable")
