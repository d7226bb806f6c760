import json
from dataclasses import replace
from pathlib import Path

import pytest

from fitune.allocator.prediction import Interval
from fitune.machine.cards import ContextPrior
from fitune.machine.devices import cpu_device, find_device
from fitune.planning import past_errors as residuals
from fitune.planning.past_errors import (
    Circumstances,
    Residual,
    add_residual,
    circumstances,
    measured_context,
    read_residuals,
    widen,
)

HERE = Circumstances("NVIDIA GeForce RTX 4090", "580.65", "2.13.0", "minimind2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_added_is_read_in_order() -> None:
    for measured in (98, 103):
        add_residual(Residual(HERE, 100, measured))
    assert [residual.ratio for residual in read_residuals(HERE)] == [0.98, 1.03]


@pytest.mark.parametrize("field", ["device", "driver", "torch", "model"])
def test_other_circumstances_do_not_count(field: str) -> None:
    add_residual(Residual(replace(HERE, **{field: "another"}), 100, 98))
    assert read_residuals(HERE) == ()


@pytest.mark.parametrize("made_by", [{}, {"made_by": "0.1.0, method 1"}])
def test_what_another_version_predicted_does_not_count(
    cache: Path, made_by: dict[str, str]
) -> None:
    add_residual(Residual(HERE, 100, 98))
    path = cache / "residuals.jsonl"
    line = json.loads(path.read_text())
    del line["made_by"]
    path.write_text(json.dumps(line | made_by) + "\n")
    assert read_residuals(HERE) == ()
    assert measured_context(HERE) is None


def test_damaged_lines_are_passed_over(cache: Path) -> None:
    add_residual(Residual(HERE, 100, 98))
    path = cache / "residuals.jsonl"
    path.write_text(
        f'nonsense\n[1]\n{{"predicted_bytes": 1}}\n{path.read_text()}{path.read_text()[:30]}'
    )
    assert len(read_residuals(HERE)) == 1


def test_only_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residuals, "KEPT", 3)
    for measured in range(1, 6):
        add_residual(Residual(HERE, 100, measured))
    assert [residual.measured_bytes for residual in read_residuals(HERE)] == [3, 4, 5]


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "file" / "below"))
    add_residual(Residual(HERE, 100, 98))
    assert read_residuals(HERE) == ()


def test_earlier_runs_widen_the_interval_and_are_named() -> None:
    runs = tuple(Residual(HERE, 1000, measured) for measured in (970, 1020))
    wider = widen(Interval(1100, 1300, ("the context",)), runs, reserved_bytes=1000)
    assert (wider.low_bytes, wider.high_bytes) == (1070, 1320)
    assert wider.reasons == (
        "the context",
        "2 earlier runs of this model here differed from their predictions by -3.0% to +2.0%",
    )


def test_runs_that_all_took_less_leave_the_upper_end() -> None:
    wider = widen(Interval(1100, 1300, ()), (Residual(HERE, 1000, 970),), reserved_bytes=1000)
    assert (wider.low_bytes, wider.high_bytes) == (1070, 1300)


def test_the_context_is_the_one_that_runs_of_any_model_found() -> None:
    for model, context in (
        ("minimind2", 300),
        ("minimind-3", 320),
        ("minimind2", 310),
        ("minimind2", None),
    ):
        add_residual(Residual(replace(HERE, model=model), 100, 98, context))
    add_residual(Residual(replace(HERE, driver="another"), 100, 98, 900))
    assert measured_context(HERE) == ContextPrior(300, 310, 320)


def test_without_a_run_there_is_no_measured_context() -> None:
    assert measured_context(HERE) is None


def test_a_source_is_kept_without_its_directory() -> None:
    assert circumstances(find_device("4090"), "/home/someone/models/tiny").model == "tiny"


def test_on_a_cpu_the_c_allocator_stands_for_the_driver() -> None:
    assert circumstances(cpu_device(), "minimind2").driver.startswith(
        ("glibc", "musl", "tcmalloc", "unknown")
    )
