"""Names what a kernel allocates and frees while it runs, step by step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Output:
    """An output is allocated: the one of this number."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Free:
    """A temporary is freed: the one that was allocated as this number."""

    number: int


Allocation = int | Output | Free
"""A step of what a kernel does: an int allocates a temporary of so many bytes. Outputs that are not named are allocated
before the first step; temporaries that are not freed by a step are freed when the operator returns."""
