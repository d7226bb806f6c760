"""Describes how memory ran out once, in numbers and text, without holding on to any tensor."""

from dataclasses import dataclass

from fitune.step.progress import Place
from fitune.units import format_bytes

#: the parts of a step after its last piece, which smaller pieces would not help
LATE: tuple[Place, ...] = ("sum", "clip", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One case of running out of memory."""

    place: Place
    #: of the piece that was being computed
    row_ids: tuple[int, ...] = ()
    #: its padded tokens
    num_positions: int = 0
    #: of the allocation that failed, if the error names them
    needed_bytes: int | None = None
    #: after everything was given back
    free_bytes: int | None = None
    #: free bytes plus what the step itself stores: what other programs left to the whole step
    left_bytes: int | None = None
    #: what was done about it, as a clause
    action: str = ""
    #: the process that failed, if all processes repeat the step together
    rank: int = 0

    @property
    def where(self) -> str:
        if self.place in LATE or not self.row_ids:
            return self.place
        samples = (
            f"sample {self.row_ids[0]}"
            if len(self.row_ids) == 1
            else f"{len(self.row_ids)} samples"
        )
        return f"{self.place} of {samples} ({self.num_positions:,} tokens with padding)"

    def __str__(self) -> str:
        needed = (
            ""
            if self.needed_bytes is None
            else f", {format_bytes(self.needed_bytes)} at once were missing"
        )
        process = f"rank {self.rank}: " if self.rank else ""
        return (
            f"{process}out of memory in the {self.where}{needed}: {self.action}; no sample is lost"
        )


#: Another process ran out of memory; the details arrive in the next exchange.
ELSEWHERE = Failure(place="elsewhere")


def missing_memory(failure: Failure) -> str:
    """Return the beginning of a message that says how much memory was missing where."""
    needed = "" if failure.needed_bytes is None else f" for {format_bytes(failure.needed_bytes)}"
    return f"no memory{needed} in the {failure.where} with {format_bytes(failure.free_bytes)} free"
