"""What safe steps carry from one to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import nn

from fitune.machine.process_memory import usable_bytes
from fitune.step.progress import P, Work


@dataclass(frozen=True)
class Fallback(Generic[P]):
    """Something that saves memory and changes no gradient. name: as the user would configure it."""

    name: str
    apply: Callable[[Work[P]], Work[P]]


@dataclass(kw_only=True)
class Protection(Generic[P]):
    """The work of a run's steps, and what is done where memory runs out."""

    work: Work[P]
    #: of the run; with a step's number it seeds what the step draws
    seed: int = 0
    #: tried in this order where a single sample does not fit
    fallbacks: list[Fallback[P]] = field(default_factory=list)
    #: the names of the fallbacks that are in force
    applied: tuple[str, ...] = ()
    #: leave a sample out from now on that does not fit even then, instead of ending the run
    quarantine: bool = False
    quarantined: set[int] = field(default_factory=set)
    #: returns the bytes that are free; asks the device where it is None
    room: Callable[[], int | None] | None = None
    #: the buffers that a forward changes, once they are known
    changing_buffers: list[tuple[nn.Module, str]] | None = None
    #: what a person can do where nothing helps, as a clause
    way_out: str = "give shorter samples or a smaller model"

    @property
    def device(self) -> torch.device:
        return next(self.work.model.parameters()).device

    def free_bytes(self) -> int | None:
        return usable_bytes(self.device) if self.room is None else self.room()

    def apply(self, name: str) -> None:
        """Apply the fallback of this name from now on; of no effect where it is in force or not among them."""
        for fallback in [each for each in self.fallbacks if each.name == name]:
            self.fallbacks.remove(fallback)
            self.work = fallback.apply(self.work)
            self.applied += (name,)
