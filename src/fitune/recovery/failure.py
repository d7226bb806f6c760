"""What is known of running out of memory once, in numbers and words: whoever holds it holds no tensor."""

from dataclasses import dataclass

from fitune.step.progress import Place
from fitune.units import format_bytes

LATE: tuple[Place, ...] = ("sum", "clip", "update")
"""The parts of a step after its last piece: smaller pieces would not help them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Memory ran out once."""

    place: Place
    #: of the piece that was computed
    row_ids: tuple[int, ...] = ()
    num_positions: int = 0
    #: of the allocation that failed, where the error tells it
    needed_bytes: int | None = None
    #: free once everything was given back
    free_bytes: int | None = None
    #: free, and what the step itself keeps: what other programs left to the whole step
    left_bytes: int | None = None
    #: what was done about it, as a clause
    action: str = ""
    #: of the process, where all go back together
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


ELSEWHERE = Failure(place="elsewhere")
"""Another process ran out of memory; its details arrive in the next exchange."""


def no_room(failure: Failure) -> str:
    """Say what was missing, as the beginning of a sentence."""
    needed = "" if failure.needed_bytes is None else f" for {format_bytes(failure.needed_bytes)}"
    return f"no memory{needed} in the {failure.where} with {format_bytes(failure.free_bytes)} free"
