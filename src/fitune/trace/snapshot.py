"""Reads what a real card recorded: a pickle of `torch.cuda.memory._snapshot()`.

The file lists allocator actions by device, with addresses, requested sizes, streams and, where they
were recorded, Python frames. The frames show the phases. An allocator does not know what it
allocates for, so the category is guessed: storages from before the recording are parameters, and
others have the category of their phase.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from fitune.boundary import raised_as
from fitune.errors import UsageError
from fitune.recorder.events import Category, MemoryEvent, MemoryTrace, Phase

#: "free_requested" is the free for the allocator's statistics; "free_completed" follows when the
#: streams are done.
_FREES = ("free_requested", "free")
_CATEGORY: Mapping[Phase, Category] = {
    "load": "parameter",
    "forward": "activation",
    "backward": "temporary",
    "optimizer": "temporary",
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers and numbers only, so that a file cannot run code."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UsageError(
            f"the snapshot holds {module_name}.{global_name}, not plain containers only; it is not read"
        )


@dataclass(frozen=True)
class FailedRequest:
    """An allocation for which the card had no room."""

    num_bytes: int
    #: what the card had free then
    free_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """What a card recorded of one device."""

    #: the allocations and frees, in order
    trace: MemoryTrace
    #: the allocations that failed, in order
    failed: tuple[FailedRequest, ...]


def read_snapshot(path: Path, *, device: int = 0) -> MemoryTrace:
    """Return the allocations and frees of one device; see `read_history`."""
    return read_history(path, device=device).trace


def read_history(path: Path, *, device: int = 0) -> Snapshot:
    """Read what a card recorded.

    Blocks from before the recording are first, in phase load. Raises UsageError for a file that is
    no snapshot, or that has no action of this device.
    """
    try:
        with path.open("rb") as file:
            snapshot = _PlainUnpickler(file).load()
        actions = snapshot["device_traces"][device]
        segments = [
            segment for segment in snapshot["segments"] if segment.get("device", 0) == device
        ]
    except UsageError:
        raise
    # bytes that are no pickle can raise any exception
    except Exception as error:
        raise UsageError(
            f"{path} is no snapshot of torch.cuda.memory with device {device}: {error}"
        ) from error
    if not actions:
        raise UsageError(
            f"{path} holds no action of device {device}: call torch.cuda.memory._record_memory_history() before the run"
        )
    with raised_as(
        UsageError, f"{path} is a damaged snapshot of torch.cuda.memory", "record it again"
    ):
        events = tuple(_events(actions, segments))
        failed = tuple(
            FailedRequest(action["size"], action.get("device_free", action.get("addr", 0)))
            for action in actions
            if action["action"] == "oom"
        )
    source = (
        f"recorded by PyTorch's allocator on device {device}",
        "categories are guessed from the phase",
    )
    return Snapshot(MemoryTrace(events, source), failed)


def _events(
    actions: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, object]]
) -> Iterator[MemoryEvent]:
    numbers = count(1)
    streams: dict[int, int] = {}
    live: dict[int, MemoryEvent] = {}
    for address, num_bytes, stream in _allocated_before(actions, segments):
        event = MemoryEvent(
            next(numbers),
            num_bytes,
            "parameter",
            "load",
            stream=streams.setdefault(stream, len(streams)),
        )
        live[address] = event
        yield event
    phase: Phase = "forward"
    step = 1
    for action in actions:
        before, phase = phase, _phase(action.get("frames", ()), phase)
        step += before == "optimizer" and phase == "forward"
        if action["action"] == "alloc" and action["size"]:
            stream = streams.setdefault(action.get("stream", 0), len(streams))
            op = _innermost(action.get("frames", ()))
            event = MemoryEvent(
                next(numbers),
                action["size"],
                _CATEGORY[phase],
                phase,
                step=step,
                module=_place(action.get("frames", ())),
                op=op,
                stream=stream,
            )
            live[action["addr"]] = event
            yield event
        elif action["action"] in _FREES:
            allocated = live.pop(action["addr"], None)
            if allocated is None:
                continue
            yield MemoryEvent(
                allocated.storage,
                -allocated.num_bytes,
                allocated.category,
                phase,
                step=step,
                module=allocated.module,
                op=allocated.op,
                stream=allocated.stream,
            )


def _allocated_before(
    actions: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, int, int]]:
    """Yield address, bytes and stream of what was allocated before the recording began.

    These are the blocks that are freed without having been allocated, or that are still allocated.
    """
    seen: set[int] = set()
    for action in actions:
        if action["action"] in _FREES and action["addr"] not in seen:
            yield action["addr"], action["size"], action.get("stream", 0)
        if action["action"] in ("alloc", *_FREES):
            seen.add(action["addr"])
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and address not in seen:
                yield address, block.get("requested_size", block["size"]), segment.get("stream", 0)
            address += block["size"]


def _phase(frames: Sequence[Mapping[str, Any]], before: Phase) -> Phase:
    """Return the phase that the outermost frame shows; the phase before if there are no frames."""
    if not frames:
        return before
    for frame in reversed(frames):
        name, file = frame.get("name", ""), frame.get("filename", "")
        if "/optim/" in file and "step" in name:
            return "optimizer"
        if name in ("_engine_run_backward", "run_backward") or file.endswith(
            "torch/autograd/__init__.py"
        ):
            return "backward"
    return "forward"


def _place(frames: Sequence[Mapping[str, object]]) -> str:
    """Return the innermost line of code outside of PyTorch, as file:line and function."""
    for frame in frames:
        parts = Path(str(frame.get("filename", ""))).parts
        if parts and "torch" not in parts and not parts[0].startswith("??"):
            return f"{parts[-1]}:{frame.get('line', 0)} {frame.get('name', '')}"
    return ""


def _innermost(frames: Sequence[Mapping[str, object]]) -> str:
    return str(frames[0].get("name", "")) if frames else ""
