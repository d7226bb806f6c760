"""The genuine allocator's own record of steps, as events of fitune: what was asked for and given back, in order."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fitune.recorder.events import MemoryEvent, Phase
from fitune.trace.snapshot import _CATEGORY, _FREES, _allocated_before, _phase

NUM_FRAMES = 3
"""Python functions that an allocation is named by, the innermost first."""
_BETWEEN = (
    "torch/nn/modules/module.py",
    "torch/_ops.py",
    "torch/utils/_contextlib.py",
    "torch/amp/autocast_mode.py",
)
"""Files whose functions only call others."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """requested_bytes: without what blocks are larger than was asked for."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass
class History:
    """Of steps that are watched. peaks: of each. events: of the last ones, whose number `keep` is; step 0 is what was
    there before them."""

    num_steps: int
    keep: int = 1
    peaks: list[Peaks] = field(default_factory=list)
    events: list[MemoryEvent] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def watch(self, step: Callable[[int], Any]) -> None:
        """Does the steps 1, 2, ..., and writes down what they allocate."""
        self.begin()
        for number in range(1, self.num_steps + 1):
            step(number)
            self.end_step()

    def begin(self) -> None:
        gc.collect()
        self._record_if_wanted()
        torch.cuda.reset_peak_memory_stats()

    def end_step(self) -> None:
        """At the end of each step, which is the beginning of the next one."""
        torch.cuda.synchronize()
        counted = torch.cuda.memory_stats()
        names = ("requested", "allocated", "reserved")
        self.peaks.append(Peaks(*(counted[f"{name}_bytes.all.peak"] for name in names)))
        if len(self.peaks) > self.num_steps - self.keep:
            snapshot = torch.cuda.memory._snapshot()
            self._ends.append(len(snapshot["device_traces"][0]))
            if len(self.peaks) == self.num_steps:
                torch.cuda.memory._record_memory_history(enabled=None)
                self.events = list(_events(snapshot, self._ends))
        self.begin()

    def _record_if_wanted(self) -> None:
        if len(self.peaks) == self.num_steps - self.keep:
            torch.cuda.memory._record_memory_history(stacks="python")


def _events(snapshot: Mapping[str, Any], ends: Sequence[int]) -> Iterator[MemoryEvent]:
    """ends: numbers of actions at the ends of the steps."""
    numbers = count(1)
    alive: dict[int, MemoryEvent] = {}
    actions = snapshot["device_traces"][0]
    for address, num_bytes, stream in _allocated_before(actions, snapshot["segments"]):
        alive[address] = MemoryEvent(next(numbers), num_bytes, "parameter", "load", stream=stream)
        yield alive[address]
    begin = 0
    for step, end in enumerate(ends, start=1):
        phase: Phase = "forward"
        for action in actions[begin:end]:
            frames = action.get("frames", ())
            phase = (
                _phase(frames, phase) if frames else "backward"
            )  # autograd's own thread runs no Python
            if action["action"] == "alloc" and action["size"]:
                born = MemoryEvent(
                    next(numbers),
                    action["size"],
                    _CATEGORY[phase],
                    phase,
                    step=step,
                    op=_name(frames),
                    stream=action.get("stream", 0),
                )
                alive[action["addr"]] = born
                yield born
            elif (
                action["action"] in _FREES and (died := alive.pop(action["addr"], None)) is not None
            ):
                yield MemoryEvent(
                    died.storage, -died.num_bytes, died.category, phase, step=step, op=died.op
                )
        begin = end


def _name(frames: Sequence[Mapping[str, Any]]) -> str:
    telling = [frame for frame in frames if not frame["filename"].endswith(_BETWEEN)][:NUM_FRAMES]
    return " < ".join(
        f"{frame['name']} ({Path(frame['filename']).name}:{frame['line']})" for frame in telling
    )
