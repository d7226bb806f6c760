"""Names what a kernel allocates and frees while it runs, step by step."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Output:
    """An output is allocated: the one of this number. on_host: nothing on the
    card."""

    number: int = 0
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Free:
    """A temporary is freed: the one that was allocated as this number."""

    number: int


Allocation = int | Output | Free
"""A step of what a kernel does: an int allocates a temporary of so many bytes. Outputs that are not named are allocated
before the first step; temporaries that are not freed by a step are freed when the operator returns."""
FREE = Free(-1)
"""For `resolve`: the newest temporary that lives is freed."""


def resolve(steps: Iterable[Allocation]) -> list[Allocation]:
    """Returns the steps with the number of what each FREE frees."""
    living: list[int] = []
    result: list[Allocation] = []
    num_temporaries = 0
    for step in steps:
        if isinstance(step, int):
            living.append(num_temporaries)
            num_temporaries += 1
        elif isinstance(step, Free):
            step = step if step != FREE else Free(living[-1])
            living.remove(step.number)
        result.append(step)
    return result
