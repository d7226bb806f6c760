import pickle
from pathlib import Path
from typing import Any

import pytest

from fitune.allocator.replay import ReplaySettings, replay
from fitune.cli.app import main
from fitune.errors import UsageError
from fitune.trace.snapshot import read_snapshot

BACKWARD = [
    {"name": "mul", "filename": "x.py"},
    {"name": "_engine_run_backward", "filename": "graph.py"},
]
OPTIMIZER = [
    {"name": "_adamw", "filename": "adamw.py"},
    {"name": "step", "filename": "torch/optim/adamw.py"},
]
FORWARD = [{"name": "linear", "filename": "model.py"}]


def action(
    kind: str, addr: int, size: int, frames: list[dict[str, str]] = FORWARD, stream: int = 0
) -> dict[str, Any]:
    return {"action": kind, "addr": addr, "size": size, "stream": stream, "frames": frames}


def write(
    directory: Path, actions: list[dict[str, Any]], segments: list[dict[str, Any]] | None = None
) -> Path:
    path = directory / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": segments or [], "device_traces": [actions]}))
    return path


def test_allocations_and_frees_become_events(tmp_path: Path) -> None:
    actions = [
        action("segment_alloc", 1, 2 << 20), action("alloc", 1, 100), action("free_requested", 1, 100),
        action("free_completed", 1, 100),
    ]  # fmt: skip
    assert [event.num_bytes for event in read_snapshot(write(tmp_path, actions)).events] == [
        100,
        -100,
    ]


def test_an_address_used_twice_is_two_storages(tmp_path: Path) -> None:
    actions = [action("alloc", 1, 100), action("free_requested", 1, 100), action("alloc", 1, 50)]
    assert [event.storage for event in read_snapshot(write(tmp_path, actions)).events] == [1, 1, 2]


def test_phases_and_steps_come_from_the_frames(tmp_path: Path) -> None:
    actions = [
        action("alloc", 1, 10), action("alloc", 2, 10, BACKWARD), action("alloc", 3, 10, OPTIMIZER),
        action("alloc", 4, 10),
    ]  # fmt: skip
    events = read_snapshot(write(tmp_path, actions)).events
    assert [(event.phase, event.step) for event in events] == [
        ("forward", 1), ("backward", 1), ("optimizer", 1), ("forward", 2),
    ]  # fmt: skip


def test_what_was_allocated_before_the_recording_comes_first(tmp_path: Path) -> None:
    blocks = [
        {"state": "active_allocated", "size": 512, "requested_size": 500},
        {"state": "inactive", "size": 512},
    ]
    actions = [action("alloc", 7000, 20), action("free_requested", 9000, 30)]
    events = read_snapshot(
        write(tmp_path, actions, [{"device": 0, "address": 5000, "blocks": blocks}])
    ).events
    assert [(event.num_bytes, event.phase) for event in events[:2]] == [(30, "load"), (500, "load")]


def test_streams_are_numbered_as_they_appear(tmp_path: Path) -> None:
    actions = [
        action("alloc", 1, 10, stream=77),
        action("alloc", 2, 10, stream=88),
        action("alloc", 3, 10, stream=77),
    ]
    assert [event.stream for event in read_snapshot(write(tmp_path, actions)).events] == [0, 1, 0]


def test_a_snapshot_replays_to_its_peak(tmp_path: Path) -> None:
    trace = read_snapshot(write(tmp_path, [action("alloc", 1, 1000), action("alloc", 2, 600)]))
    assert replay(trace, ReplaySettings()).peak_allocated_bytes == 2048


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[print]]}))
    with pytest.raises(UsageError, match=r"builtins\.print"):
        read_snapshot(path)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"device_traces": []})]
)
def test_a_file_that_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no snapshot"):
        read_snapshot(path)


def test_a_snapshot_without_history_says_how_to_record_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="_record_memory_history"):
        read_snapshot(write(tmp_path, []))


def test_the_command_shows_what_filled_a_card_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [
        {"name": "linear", "filename": "/x/torch/nn/functional.py", "line": 1},
        {"name": "forward", "filename": "/home/me/model.py", "line": 41},
    ]
    actions = [
        action("alloc", 1, 3 << 30) | {"frames": frames},
        {"action": "oom", "size": 2 << 30, "device_free": 1 << 30, "stream": 0},
    ]
    path = write(tmp_path, actions)
    assert main(["plan", "--snapshot", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "out of memory: 2.0 GiB were asked for, with 1.0 GiB free on the card" in shown
    assert "model.py:41 forward" in shown
    assert main(["plan", "--snapshot", str(path), "--gpu", "RTX 4090"]) == 2
    assert "--snapshot shows what a card recorded: drop --gpu" in capsys.readouterr().err
