"""What is the same for all calls of an operator, found out once."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def by_operator(find: Callable[[Any], T]) -> Callable[[object], T]:
    """As functools.cache, for functions of an OpOverload: its hash is computed in Python each time, its id is not."""
    found: dict[int, tuple[object, T]] = {}

    def look_up(func: Any) -> T:
        known = found.get(id(func))
        if known is None:
            known = found[id(func)] = (
                func,
                find(func),
            )  # with the operator, so that its id stays its own
        return known[1]

    return look_up
