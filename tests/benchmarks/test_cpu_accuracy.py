"""The CPU's benchmark: its quick form runs whole, its committed results are what the predictor carries."""

from statistics import median

import pytest

from cpu_accuracy import QUICK, SETTINGS, compare, environment_of, read_results, section


def test_a_step_takes_what_is_predicted_where_blocks_are_mapped() -> None:
    row = compare(QUICK, "mapped")
    assert row.failure is None
    assert row.error_fraction is not None
    assert abs(row.error_fraction) < 0.08


def test_the_settings_differ_in_everything_that_moves_memory() -> None:
    assert len(SETTINGS) >= 12
    assert {setting.source for setting in SETTINGS} == {
        "minimind2-small",
        "minimind-3",
        "minimind2",
        "smollm2",
    }
    assert {1, 8} <= {setting.micro for setting in SETTINGS}


@pytest.mark.parametrize(
    ("allocator", "worst", "middle"),
    [("mapped", 0.08, 0.04), ("tcmalloc", 0.12, 0.06), ("glibc", 0.12, 0.12)],
)
def test_the_committed_results_are_within_their_bounds(
    allocator: str, worst: float, middle: float
) -> None:
    errors = [
        abs(row.error_fraction)
        for row in read_results()
        if row.allocator == allocator and row.error_fraction is not None
    ]
    assert len(errors) == len(SETTINGS)
    assert max(errors) < worst
    assert median(errors) < middle


def test_every_measured_setting_stands_in_the_table() -> None:
    page = "\n".join(section())
    assert all(f"| {row.setting} | {row.allocator} |" in page for row in read_results())


def test_a_measurement_does_not_inherit_the_caller_s_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libtcmalloc.so")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    environment = environment_of("glibc")
    assert environment is not None
    assert not {"LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_"} & environment.keys()
