"""What the card says to questions about values that no kernel has computed."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def answers(*, truth: int = 1, selected: int = -1) -> Iterator[None]:
    """truth: whether all or any are so, as is asked of a mask (0: it is not all ones, it is of packed rows). selected:
    how many elements a mask selects; -1: what the memory holds."""
    stand_in = ctypes.CDLL(None)
    before = stand_in.rehearsal_set_truth(truth), stand_in.rehearsal_set_selected(selected)
    try:
        yield
    finally:
        stand_in.rehearsal_set_truth(before[0])
        stand_in.rehearsal_set_selected(before[1])
