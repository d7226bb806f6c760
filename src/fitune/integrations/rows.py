"""Takes a batch apart by its samples, for the safe steps of training loops that are not fitune's.

A batch is a mapping whose tensors have the samples as their first dimension. `SafeStep` and
`SafeSteps` compute it in parts; each defines how a part is weighted and how large it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples(ABC):
    """Some samples of one batch, computed together in one forward and backward."""

    #: the index of each sample in the batch
    row_ids: tuple[int, ...]
    #: tensors whose first dimension is the samples, and values that belong to all samples
    tensors: Mapping[str, Any]

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """The number of tokens, padding included, or of whatever else the size is measured in."""
        ...

    def take(self, places: Sequence[int]) -> Self:
        """Return the samples at these places of this part, in the order of `places`."""
        tensors = {
            name: value[list(places)] if isinstance(value, Tensor) else value
            for name, value in self.tensors.items()
        }
        row_ids = tuple(self.row_ids[place] for place in places)
        return replace(self, row_ids=row_ids, tensors=tensors)

    def split(self, most_positions: int) -> list[Self]:
        """Split into parts of at most `most_positions`, or of one sample where one is larger."""
        at_once = max(most_positions * len(self.row_ids) // self.num_positions, 1)
        places = range(len(self.row_ids))
        if at_once >= len(places):
            return [self]
        return [
            self.take(places[first : first + at_once]) for first in range(0, len(places), at_once)
        ]

    def without(self, row_ids: Collection[int]) -> Self | None:
        """Return the part without these samples, or None where no sample remains."""
        remaining = [place for place, row in enumerate(self.row_ids) if row not in row_ids]
        return self.take(remaining) if remaining else None


S = TypeVar("S", bound=Samples)


def most_different_samples(whole: S, num_targets: Callable[[S], float]) -> tuple[S, S, S] | None:
    """Return the samples with the fewest and with the most targets, together and each alone.

    Samples without targets are not considered. Returns None where fewer than two have targets.
    """
    samples = sorted((whole.take([place]) for place in range(len(whole.row_ids))), key=num_targets)
    samples = [sample for sample in samples if num_targets(sample)]
    if len(samples) < 2:
        return None
    first, second = samples[0], samples[-1]
    both = whole.take([whole.row_ids.index(sample.row_ids[0]) for sample in (first, second)])
    return both, first, second


def without_targets(tensors: Mapping[str, Any]) -> dict[str, object]:
    """Return the same tensors with every label replaced by -100, which no loss counts."""
    return {**tensors, "labels": torch.full_like(tensors["labels"], -100)}
