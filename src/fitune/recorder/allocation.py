"""Describe what a kernel allocates and frees while it runs, step by step."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Output:
    """Allocates the output with this number."""

    number: int = 0
    #: whether it is on the host, so that nothing is allocated on the card
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Free:
    """Frees the temporary that was allocated with this number."""

    number: int


#: A step of a kernel; an int allocates a temporary of so many bytes. Outputs that no step names are
#: allocated before the first step. Temporaries that no step frees are freed when the operator
#: returns.
Allocation = int | Output | Free
#: In rules: frees the newest temporary that is still allocated; `resolve` fills in its number
FREE = Free(-1)


def resolve(steps: Iterable[Allocation]) -> list[Allocation]:
    """Return the steps with each FREE replaced by the number of the temporary that it frees."""
    live: list[int] = []
    result: list[Allocation] = []
    num_temporaries = 0
    for step in steps:
        if isinstance(step, int):
            live.append(num_temporaries)
            num_temporaries += 1
        elif isinstance(step, Free):
            step = step if step != FREE else Free(live[-1])
            live.remove(step.number)
        result.append(step)
    return result
