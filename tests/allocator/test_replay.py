import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from golden_recordings import compare_with_recording, main, read_recording

from fitune.allocator.replay import FailedAllocation, ReplaySettings, replay
from fitune.errors import UsageError
from fitune.recorder.events import MemoryEvent, MemoryTrace
from fitune.units import MIB

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests/golden/allocator").glob("*.json.gz"))
NAME = "near_cnn__maxsplit32_gc06f95__hard.json.gz"


def trace(*events: tuple[int, int, int]) -> MemoryTrace:
    """Events of (storage, MiB, step)."""
    return MemoryTrace(
        tuple(
            MemoryEvent(storage, size * MIB, category="temporary", phase="forward", step=step)
            for storage, size, step in events
        )
    )


def recording() -> dict[str, Any]:
    return read_recording(ROOT / "tests/golden/allocator/micro_oom_fragmentation__frac08.json.gz")


def test_there_are_recordings_of_every_configuration() -> None:
    assert len({path.name.split("__")[1].split(".")[0] for path in GOLDEN}) == 13


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_a_recording_of_the_real_allocator_is_reproduced(path: Path) -> None:
    assert compare_with_recording(read_recording(path)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["expected"][7].update(allocated=1),
        lambda r: r["expected"][7].update(addr_crc32=1),
        lambda r: r["expected"][7].update(n_inactive_split=99),
        lambda r: r["expected"][7].update(something_new=0),
        lambda r: r["expected"].append({"i": 10**6}),
        lambda r: r["reserved_changes"].pop(),
        lambda r: r["reserved_changes"].append([10**6, 0]),
        lambda r: r["ooms"].pop(),
        lambda r: r["ooms"].append({"i": 10**6}),
        lambda r: r["ooms"][1].update(message=""),
        lambda r: r["ooms"][2].update(device_free=0),
        lambda r: r.update(stopped_at=3),
        lambda r: r["driver"].update(cudaMalloc=0),
        lambda r: r["final_layout"].pop(),
        lambda r: r["final_layout"][0][5][0].__setitem__(2, 0),
        lambda r: r.update(final_layout_sha1=""),
    ],
)
def test_every_recorded_field_is_compared(spoil: Any) -> None:
    spoiled = recording()
    spoil(spoiled)
    assert compare_with_recording(spoiled) is not None


def test_the_command_says_ok_for_a_file_that_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN[0])]) == 0
    assert capsys.readouterr().out == f"{GOLDEN[0]}: ok\n"


def test_the_command_names_the_first_mismatch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = recording()
    spoiled["expected"][2]["reserved"] = 5
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps(spoiled))
    assert main([str(GOLDEN[0]), str(path)]) == 1
    assert capsys.readouterr().out.endswith(
        "spoiled.json: event 2: reserved expected 5, got 20971520\n"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b"{}", gzip.compress(b"{}", mtime=0)[:-4], b"\x1f\x8bnot gzip"],
)
def test_the_command_gives_2_for_a_file_that_is_no_recording(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json.gz"
    path.write_bytes(content)
    assert main([str(path), str(GOLDEN[0])]) == 2
    assert "unreadable: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"events": 5}, "events: "),
        ({"events": [["a", 1]]}, r"the event \['a', 1\]"),
        ({"events": [["q"]]}, r"the event \['q'\]"),
        ({"events": [["a", 1, -5]]}, r"the event \['a', 1, -5\]"),
        ({"events": [["f", [1]]]}, r"the event \['f', \[1\]\]"),
        ({"expected": [{"i": 0}, {}]}, r"expected\.1"),
        ({"vram_bytes": "much"}, "vram_bytes: "),
        ({"memory_fraction": 7}, "memory_fraction: "),
        ({"ooms": 7}, "ooms: "),
        ({"driver": []}, "driver: "),
        ({"reserved_changes": "no"}, "reserved_changes: "),
        ({"config": None}, "config: "),
    ],
)
def test_a_malformed_recording_is_refused_where_it_is_wrong(
    change: dict[str, Any], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(recording() | change))
    assert main([str(path)]) == 2
    assert re.search(place, capsys.readouterr().out)


def test_brackets_without_end_are_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[" * 100_000)
    assert main([str(path)]) == 2


def test_a_file_that_is_not_there_gives_2() -> None:
    assert main(["/nowhere/file.json"]) == 2


def test_settings_of_a_recording_that_cannot_be_used_are_unreadable() -> None:
    with pytest.raises(UsageError, match="did you mean expandable_segments"):
        compare_with_recording({**recording(), "config": "expandable_segment:True"})


def test_the_peaks_of_a_trace_are_those_of_the_allocator() -> None:
    result = replay(
        trace((1, 30, 0), (2, 5, 1), (2, -5, 1), (1, -30, 1), (3, 11, 1)), ReplaySettings()
    )
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (35 * MIB, 50 * MIB)
    assert result.peak_event == 1


def test_the_last_step_has_its_own_peaks() -> None:
    result = replay(
        trace((1, 30, 1), (2, 40, 1), (2, -40, 1), (3, 30, 2), (3, -30, 2)), ReplaySettings()
    )
    assert result.step_peaks[2] == (60 * MIB, 70 * MIB)
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (70 * MIB, 70 * MIB)


def test_a_warm_up_block_is_what_the_first_storages_are_cut_from() -> None:
    result = replay(trace((1, 30, 1), (2, 40, 1)), ReplaySettings(warm_up_bytes=70 * MIB))
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (70 * MIB, 70 * MIB)


def test_the_first_failure_stops_the_replay() -> None:
    result = replay(
        trace((1, 30, 1), (2, 80, 1), (3, 20, 2)), ReplaySettings(total_bytes=100 * MIB)
    )
    assert result.first_oom == FailedAllocation(1, 80 * MIB, 30 * MIB, 30 * MIB, 70 * MIB)
    assert (result.num_ooms, result.num_alloc_retries, result.peak_allocated_bytes) == (
        1,
        1,
        30 * MIB,
    )
    assert 2 not in result.step_peaks


def test_a_caught_failure_lets_the_replay_go_on() -> None:
    events = trace((1, 30, 1), (2, 80, 1), (2, -80, 1), (3, 20, 2))
    result = replay(events, ReplaySettings(total_bytes=100 * MIB, on_oom="continue"))
    assert (result.num_ooms, result.peak_allocated_bytes, result.peak_event) == (1, 50 * MIB, 3)


def test_a_warm_up_that_does_not_fit_is_a_failure_before_the_first_event() -> None:
    result = replay(
        trace((1, 30, 1)), ReplaySettings(total_bytes=100 * MIB, warm_up_bytes=200 * MIB)
    )
    assert result.first_oom is not None
    assert result.first_oom.event is None
    assert result.peak_allocated_bytes == 0


def test_the_settings_reach_the_allocator() -> None:
    one = trace((1, 30, 1))
    limited = ReplaySettings(total_bytes=100 * MIB, used_by_others_bytes=80 * MIB)
    assert replay(one, limited).num_ooms == 1
    assert replay(one, ReplaySettings(total_bytes=100 * MIB, memory_fraction=0.2)).num_ooms == 1
    assert (
        replay(one, ReplaySettings(allocator="expandable_segments:True")).peak_reserved_bytes
        == 40 * MIB
    )


def test_an_empty_trace_needs_nothing() -> None:
    result = replay(MemoryTrace(()), ReplaySettings())
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes, result.peak_event) == (
        0,
        0,
        None,
    )
