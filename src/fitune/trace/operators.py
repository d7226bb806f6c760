"""What is the same for all calls of an operator, found out once; and how a kernel's own allocations are written."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Output(NamedTuple):
    """In a script: the operator's output of this number, counted from 0, is allocated."""

    number: int


class Freed(NamedTuple):
    """In a script: what the operator allocated besides its outputs is freed, by its number, counted from 0."""

    number: int


FREE = -1
"""In a script: the newest of what was allocated besides the outputs, and lives, is freed."""

Script = Sequence[int | Output | Freed]
"""What an operator allocates and frees, in order: bytes of what it does not return, `Output`, `Freed` and FREE. Outputs
that are not named come first, what is not freed is freed at the end."""


def by_operator(find: Callable[[Any], T]) -> Callable[[Any], T]:
    """As functools.cache, for functions of an OpOverload: its hash is computed in Python each time, its id is not."""
    found: dict[int, tuple[Any, T]] = {}

    def look_up(func: Any) -> T:
        known = found.get(id(func))
        if known is None:
            known = found[id(func)] = func, find(func)  # with the operator, so that its id stays its own
        return known[1]

    return look_up
