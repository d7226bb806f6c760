"""Recordings of PyTorch's own allocator, against which the `CachingAllocator` is checked.

A recording holds the configuration, the events and what the allocator did: counters at checkpoints, every change of
reserved memory, every failed allocation, the driver's calls, the final layout, and a running CRC-32 of the addresses
handed out, which shows a wrong choice of block at once.

    python tests/allocator/golden_recordings.py FILE...    compares each file, one line a file

Exit status 0: all match, 1: a mismatch, 2: a file that cannot be read.
"""

import gzip
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fitune.allocator.rules import FIRST_ADDRESS, CachingAllocator, OutOfDeviceMemoryError
from fitune.errors import UsageError

# The recordings' short names of torch.cuda.memory_stats.
_STATS = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "active": "active_bytes.all.current",
    "requested": "requested_bytes.all.current",
    "peak_allocated": "allocated_bytes.all.peak",
    "peak_reserved": "reserved_bytes.all.peak",
    "peak_active": "active_bytes.all.peak",
    "peak_requested": "requested_bytes.all.peak",
    "reserved_small": "reserved_bytes.small_pool.current",
    "allocated_small": "allocated_bytes.small_pool.current",
    "n_alloc": "allocation.all.current",
    "n_segments": "segment.all.current",
    "peak_segments": "segment.all.peak",
    "n_inactive_split": "inactive_split.all.current",
    "inactive_split_bytes": "inactive_split_bytes.all.current",
    "peak_inactive_split_bytes": "inactive_split_bytes.all.peak",
    "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
    "num_device_alloc": "num_device_alloc",
    "num_device_free": "num_device_free",
    "num_sync_all_streams": "num_sync_all_streams",
    "oversize_allocs": "oversize_allocations.current",
    "oversize_segments": "oversize_segments.current",
}
_DRIVER_CALLS = {
    "cudaMalloc": "cuda_malloc",
    "cudaMalloc_failed": "cuda_malloc_failed",
    "cudaFree": "cuda_free",
    "cuMemCreate": "mem_create",
    "cuMemCreate_failed": "mem_create_failed",
    "cuMemRelease": "mem_release",
    "cuMemMap": "mem_map",
    "cuMemUnmap": "mem_unmap",
}


_Count = Annotated[int, Field(strict=True, ge=0)]
_NUM_FIELDS = {"a": (2, 3), "f": (1,), "e": (0,), "r": (0,)}  # id, bytes, stream


class _Indexed(BaseModel):
    i: _Count | None


class _Shape(BaseModel):
    """What a replay needs of a recording's form; the values in `expected` and the rest are compared, whatever they
    are."""

    config: str
    vram_bytes: _Count
    ctx_bytes: _Count
    memory_fraction: Annotated[float, Field(gt=0, le=1)] | None
    on_oom: Literal["stop", "continue"]
    events: list[Any]
    expected: list[_Indexed]
    reserved_changes: list[Any] | None = None
    ooms: list[_Indexed] | None = None
    driver: dict[str, Any] | None = None
    final_layout: list[Any] | None = None


@dataclass(frozen=True)
class Mismatch:
    """The first difference: index of the event (number of events when it is found at the end), field, both values."""

    index: int
    field: str
    expected: Any
    got: Any


def read_recording(path: Path) -> dict[str, Any]:
    """A recording from .json or .json.gz. Raises UsageError when it is none."""
    try:
        data = path.read_bytes()
        recording: dict[str, Any] = json.loads(
            gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        )
        _Shape.model_validate(recording)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(
            str(part)
            for part in first["loc"]
            if isinstance(part, int) or part in _Shape.model_fields
        )
        raise UsageError(
            f"{path} is no recording of an allocator: {place or 'the file'}: {first['msg']}"
        ) from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as a recording: {error}") from None
    faulty = next((event for event in recording["events"] if not _is_event(event)), None)
    if faulty is not None:
        raise UsageError(
            f'{path} holds the event {faulty!r}: events are ["a", id, bytes, stream], ["f", id], ["e"] and ["r"]'
        )
    return recording


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, list)
        and len(event) > 0
        and isinstance(event[0], str)
        and len(event) - 1 in _NUM_FIELDS.get(event[0], ())
        and all(type(number) is int and number >= 0 for number in event[1:])
    )


def compare_with_recording(recording: dict[str, Any]) -> Mismatch | None:
    """Replays the events and returns the first difference. Raises UsageError for settings that cannot be used."""
    return next(_Replay(recording).differences(), None)


class _Replay:
    def __init__(self, recording: dict[str, Any]) -> None:
        self.recording = recording
        self.allocator = CachingAllocator(
            recording["config"],
            total_bytes=recording["vram_bytes"],
            used_by_others_bytes=recording["ctx_bytes"],
            memory_fraction=recording["memory_fraction"],
        )
        self.addresses: dict[int, int] = {}
        self.crc32 = 0
        self.num_ooms = 0
        self.stopped_at: int | None = None

    def differences(self) -> Iterator[Mismatch]:
        checkpoints = {checkpoint["i"]: checkpoint for checkpoint in self.recording["expected"]}
        changes = self.recording.get("reserved_changes")
        changes_left = iter(changes or ())
        reserved = 0
        num_events = 0
        for i, event in enumerate(self.recording["events"]):
            num_events = i + 1
            error = self.carry_out(event)
            if error is not None:
                yield from self.compare_oom(i, event, error)
                if self.recording["on_oom"] == "stop":
                    self.stopped_at = i
            if self.allocator.reserved_bytes != reserved:
                reserved = self.allocator.reserved_bytes
                if changes is not None:
                    yield from _compare(
                        i, "reserved_changes", next(changes_left, None), [i, reserved]
                    )
            if num_events in checkpoints:
                yield from self.compare_checkpoint(i, checkpoints.pop(num_events))
            if self.stopped_at is not None:
                break
        for left in changes_left:
            yield Mismatch(num_events, "reserved_changes", left, None)
        for left in checkpoints:
            yield Mismatch(
                num_events, "expected", f"checkpoint after {left} events", f"{num_events} events"
            )
        yield from self.compare_end(num_events)

    def carry_out(self, event: list[Any]) -> OutOfDeviceMemoryError | None:
        kind = event[0]
        if kind == "a":
            try:
                address = self.allocator.allocate(event[2], event[3] if len(event) > 3 else 0)
            except OutOfDeviceMemoryError as error:
                return error
            self.addresses[event[1]] = address
            offset = address - FIRST_ADDRESS if address else 0
            self.crc32 = zlib.crc32(struct.pack("<Q", offset), self.crc32)
        elif kind == "f":
            self.allocator.free(self.addresses.pop(event[1], 0))
        elif kind == "e":
            self.allocator.empty_cache()
        else:
            self.allocator.reset_peaks()
        return None

    def compare_oom(
        self, index: int, event: list[Any], error: OutOfDeviceMemoryError
    ) -> Iterator[Mismatch]:
        got = {
            "i": index,
            "id": event[1],
            "size": event[2],
            "allocated": error.allocated_bytes,
            "reserved": error.reserved_bytes,
            "device_free": error.free_bytes,
            "message": str(error),
        }
        ooms = self.recording.get("ooms")
        if ooms is not None:
            expected = ooms[self.num_ooms] if self.num_ooms < len(ooms) else {"i": None}
            for field, value in expected.items():
                yield from _compare(index, f"ooms.{field}", value, got.get(field))
        self.num_ooms += 1

    def compare_checkpoint(self, index: int, checkpoint: dict[str, Any]) -> Iterator[Mismatch]:
        stats = self.allocator.memory_stats()
        for field, expected in checkpoint.items():
            if field == "addr_crc32":
                yield from _compare(index, field, expected, self.crc32)
            elif field != "i":
                yield from _compare(index, field, expected, stats.get(_STATS.get(field, "")))

    def compare_end(self, index: int) -> Iterator[Mismatch]:
        recording = self.recording
        if "stopped_at" in recording:
            yield from _compare(index, "stopped_at", recording["stopped_at"], self.stopped_at)
        if recording.get("ooms") is not None:
            yield from _compare(index, "len(ooms)", len(recording["ooms"]), self.num_ooms)
        for call, expected in (recording.get("driver") or {}).items():
            got = getattr(self.allocator.driver_calls, _DRIVER_CALLS.get(call, ""), None)
            yield from _compare(index, f"driver.{call}", expected, got)
        layout = self.layout()
        if recording.get("final_layout") is not None:
            pairs = zip(recording["final_layout"], layout, strict=False)
            for number, (expected, segment) in enumerate(pairs):
                yield from _compare(index, f"final_layout[{number}]", expected, segment)
            yield from _compare(
                index, "len(final_layout)", len(recording["final_layout"]), len(layout)
            )
        if recording.get("final_layout_sha1") is not None:
            text = json.dumps(layout, separators=(",", ":"))
            digest = hashlib.sha1(text.encode()).hexdigest()
            yield from _compare(index, "final_layout_sha1", recording["final_layout_sha1"], digest)

    def layout(self) -> list[list[Any]]:
        letters = {"allocated": "A", "inactive": "I", "pending": "P"}
        return [
            [
                segment.address - FIRST_ADDRESS,
                segment.num_bytes,
                segment.stream,
                "s" if segment.is_small else "l",
                int(segment.is_expandable),
                [
                    [block.num_bytes, letters[block.state], block.requested_bytes]
                    for block in segment.blocks
                ],
            ]
            for segment in self.allocator.snapshot()
        ]


def _compare(index: int, field: str, expected: Any, got: Any) -> Iterator[Mismatch]:
    if expected != got:
        yield Mismatch(index, field, expected, got)


def main(arguments: Sequence[str]) -> int:
    """Compare the recordings of these files and write one line a file. Returns the exit status."""
    if not arguments:
        sys.stderr.write("usage: python tests/allocator/golden_recordings.py FILE...\n")
        return 2
    status = 0
    for name in arguments:
        line = "ok"
        try:
            mismatch = compare_with_recording(read_recording(Path(name)))
        except UsageError as error:
            line, status = f"unreadable: {error}", 2
        else:
            if mismatch is not None:
                line = f"event {mismatch.index}: {mismatch.field} expected {mismatch.expected}, got {mismatch.got}"
                status = max(status, 1)
        sys.stdout.write(f"{name}: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
