"""Names the card for which a step is recorded, to code that chooses its kernels by the card."""

from collections.abc import Iterator
from contextlib import contextmanager

_capability: tuple[int, int] | None = None


def recorded_capability() -> tuple[int, int] | None:
    """Return the compute capability of the card that is recorded for, None in no such recording."""
    return _capability


@contextmanager
def card_is_recorded(capability: tuple[int, int]) -> Iterator[None]:
    """Return `capability` from `recorded_capability` in this block."""
    global _capability
    before, _capability = _capability, capability
    try:
        yield
    finally:
        _capability = before
