"""The benchmark for a card, on one that is made of our own allocator."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

import accuracy
import gpu_accuracy
from fake_card import write_snapshot
from fitune.machine.cards import Device
from fitune.machine.devices import find_device
from fitune.planning.predict import predict_run
from fitune.recorder.events import MemoryTrace
from gpu_accuracy import BY_NAME, SETTINGS, Measured, Setting

TINY = Setting("tiny", "minimind2-small", 64, 1)
CARD = replace(find_device("RTX 4060"), uuid="GPU-1")


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One small setting, one card, results in a directory of their own."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_accuracy, "this_machine", lambda: (CARD,))
    monkeypatch.setattr(gpu_accuracy, "SETTINGS", (TINY,))
    monkeypatch.setattr(gpu_accuracy, "RESULTS", tmp_path / "gpu_accuracy.json")
    monkeypatch.setattr(accuracy, "TABLE", tmp_path / "accuracy.md")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.json")
    return tmp_path


@functools.cache
def recording() -> MemoryTrace:
    return predict_run(TINY.config(CARD), CARD, passes=TINY.passes(CARD)).recorded.trace


def measure(setting: Setting, device: Device, path: Path) -> Measured:
    """The card does what was recorded, and its context takes 200 MiB."""
    write_snapshot(recording(), path)
    peaks = predict_run(setting.config(device), device, passes=setting.passes(device)).training
    return Measured(
        allocated_bytes=peaks.peak_allocated_bytes,
        reserved_bytes=peaks.peak_reserved_bytes,
        device_bytes=peaks.peak_reserved_bytes + 200 * 2**20,
    )


def test_the_whole_benchmark_runs_on_a_card_that_does_what_is_predicted(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_accuracy.main([], measure=measure) == 0
    (row,) = json.loads((bench / "gpu_accuracy.json").read_text())["settings"]
    assert row["difference"] is None
    assert row["num_equal_events"] == row["num_events"] > 1000
    said = capsys.readouterr().out
    assert "tiny: allocated +0.000%, reserved +0.000%, device +" in said
    page = (bench / "accuracy.md").read_text()
    assert "# On a card" in page
    assert (
        f"| tiny: minimind2-small, 1 x 64 | {row['measured_allocated_bytes']:,} | +0.000% |" in page
    )


def test_the_first_event_that_differs_is_shown_between_its_neighbours() -> None:
    def spoiled(setting: Setting, device: Device, path: Path) -> Measured:
        events = list(recording().events)
        births = [i for i, event in enumerate(events) if event.num_bytes > 0 and event.step == 1]
        changed = events[births[7]]
        for i, event in enumerate(events):
            if event.storage == changed.storage:
                events[i] = replace(
                    event, num_bytes=event.num_bytes + 512 * (1 if event.num_bytes > 0 else -1)
                )
        write_snapshot(MemoryTrace(tuple(events)), path)
        return Measured(allocated_bytes=10**9, reserved_bytes=10**9, device_bytes=None)

    row = gpu_accuracy.compare(TINY, CARD, measure=spoiled)
    assert row.num_equal_events == 7
    assert row.difference is not None
    assert [line[12] for line in row.difference.splitlines()[1:]] == list(" > ") * 2
    assert row.error("device") is None


def test_a_setting_that_fails_on_the_card_is_named_with_its_last_words() -> None:
    row = gpu_accuracy.compare(
        TINY, CARD, measure=gpu_accuracy.measure_apart
    )  # there is no card here
    assert row.failure is not None
    assert row.measured_allocated_bytes is None
    assert "n/a" in gpu_accuracy._line(row)


def test_without_a_card_nothing_is_measured(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_accuracy, "this_machine", tuple)
    assert gpu_accuracy.main([]) == 0
    assert "no NVIDIA card here" in capsys.readouterr().out
    assert not (bench / "gpu_accuracy.json").exists()


@pytest.mark.parametrize(("card", "rows"), [("RTX 4060", 2), ("RTX 4090", 6), ("H100", 21)])
def test_settings_grow_with_the_card(card: str, rows: int) -> None:
    assert BY_NAME["full"].rows(find_device(card)) == rows


@pytest.mark.parametrize("card", ["RTX 4060", "RTX 4090", "H100"])
def test_the_largest_setting_fits_cards_of_8_24_and_80_gigabytes(card: str) -> None:
    device, setting = find_device(card), BY_NAME["every-2"]
    prediction = predict_run(setting.config(device), device, passes=setting.passes(device))
    needed = prediction.training.peak_reserved_bytes + prediction.context_bytes
    assert 0.4 * device.total_bytes < needed < 0.9 * device.total_bytes


def test_there_are_a_dozen_settings_with_different_names() -> None:
    assert len(BY_NAME) == len(SETTINGS) >= 12
