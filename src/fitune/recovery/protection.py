"""Holds what safe steps carry from one step to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import nn

from fitune.machine.process_memory import usable_bytes
from fitune.step.progress import P, Work


@dataclass(frozen=True)
class Fallback(Generic[P]):
    """A way to save memory that does not change the gradient."""

    #: as the user would configure it
    name: str
    apply: Callable[[Work[P]], Work[P]]


@dataclass(kw_only=True)
class Protection(Generic[P]):
    """The work of a run's steps, and what is done if memory runs out."""

    work: Work[P]
    #: the run's seed; with a step's number it seeds the random draws of the step
    seed: int = 0
    #: tried in this order if a single sample does not fit
    fallbacks: list[Fallback[P]] = field(default_factory=list)
    #: names of the fallbacks in force
    applied: tuple[str, ...] = ()
    #: leave out a sample that does not fit even then, instead of ending the run
    quarantine: bool = False
    #: row ids of the samples that are left out
    quarantined: set[int] = field(default_factory=set)
    #: returns the free bytes; if None, the device is queried
    query_free_bytes: Callable[[], int | None] | None = None
    #: the buffers that a forward changes, once they are known
    changing_buffers: list[tuple[nn.Module, str]] | None = None
    #: what the user can do if nothing helps, as a clause
    way_out: str = "give shorter samples or a smaller model"

    @property
    def device(self) -> torch.device:
        return next(self.work.model.parameters()).device

    def free_bytes(self) -> int | None:
        return (
            usable_bytes(self.device) if self.query_free_bytes is None else self.query_free_bytes()
        )

    def apply(self, name: str) -> None:
        """Apply the fallback of this name from now on, if there is one that is not in force yet."""
        for fallback in [each for each in self.fallbacks if each.name == name]:
            self.fallbacks.remove(fallback)
            self.work = fallback.apply(self.work)
            self.applied += (name,)
