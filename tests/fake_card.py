"""A card that does exactly what a recording says: PyTorch's snapshot of it, made by our own allocator."""

import pickle
from pathlib import Path
from typing import Any

from fitune.allocator.rules import CachingAllocator
from fitune.recorder.events import MemoryTrace

_STATES = {
    "allocated": "active_allocated",
    "inactive": "inactive",
    "pending": "active_pending_free",
}


def write_snapshot(trace: MemoryTrace, path: Path) -> None:
    """As torch.cuda.memory._snapshot() gives it when the history begins after the load: plain containers, pickled."""
    allocator = CachingAllocator()
    addresses: dict[int, int] = {}
    actions: list[dict[str, Any]] = []
    for event in trace.events:
        if event.num_bytes > 0:
            addresses[event.storage] = allocator.allocate(event.num_bytes)
            actions += _actions("alloc", addresses[event.storage], event.num_bytes, step=event.step)
        elif event.num_bytes < 0:
            address = addresses.pop(event.storage)
            allocator.free(address)
            actions += _actions("free_requested", address, -event.num_bytes, step=event.step)
            actions += _actions("free_completed", address, -event.num_bytes, step=event.step)
    segments = [
        {
            "device": 0,
            "address": segment.address,
            "total_size": segment.num_bytes,
            "stream": segment.stream,
            "blocks": [
                {
                    "size": block.num_bytes,
                    "requested_size": block.requested_bytes,
                    "state": _STATES[block.state],
                }
                for block in segment.blocks
            ],
        }
        for segment in allocator.snapshot()
    ]
    path.write_bytes(pickle.dumps({"segments": segments, "device_traces": [actions]}))


def _actions(kind: str, address: int, num_bytes: int, *, step: int) -> list[dict[str, Any]]:
    frame = {"name": "forward", "filename": "model.py", "line": 1}
    action = {"action": kind, "addr": address, "size": num_bytes, "stream": 0, "frames": [frame]}
    return [action] if step >= 1 else []
