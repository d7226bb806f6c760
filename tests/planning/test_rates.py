"""The rates of this CPU are those of an idle machine, however busy it is when they are measured."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fitune.planning import rates
from fitune.planning.cost import Ceilings

IDLE = Ceilings(
    matmul_flops_per_second={"float32": 7.5e10},
    attention_flops_per_second={"float32": 5e10},
    bandwidths=((1e6, 3e10), (1e8, 3e10)),
    exponential_bandwidth=4e10,
    mapped_bandwidth=4e9,
    launch_seconds=1e-5,
    asynchronous=False,
    origin="measured on this CPU: 100 GFLOP/s in matrix products",
)
BUSY = replace(
    IDLE,
    matmul_flops_per_second={"float32": 3.75e9},
    bandwidths=((1e6, 1e9), (1e8, 4e10)),
    launch_seconds=1e-4,
    origin="measured on this CPU: 5 GFLOP/s in matrix products",
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    rates.cpu_ceilings.cache_clear()
    yield
    rates.cpu_ceilings.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, *found: Ceilings, cores: float) -> list[Ceilings]:
    """Let the following measurements give these rates, while the process gets so many cores."""
    left = list(found)
    seconds = iter(range(100))
    monkeypatch.setattr(rates, "_measure", lambda: left.pop(0))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: float(next(seconds)))
    used = iter(range(100))
    monkeypatch.setattr(rates.time, "process_time", lambda: cores * next(used))
    rates.cpu_ceilings.cache_clear()
    return left


def test_threads_that_wait_for_each_other_do_not_lower_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    measured(monkeypatch, BUSY, IDLE, cores=1.5)
    found = rates.cpu_ceilings()
    assert found.matmul_flops_per_second == {"float32": 7.5e10}
    assert [tuple(each) for each in found.bandwidths] == [(1e6, 3e10), (1e8, 4e10)]
    assert found.launch_seconds == 1e-5
    assert found.origin == "measured on this CPU: 100 GFLOP/s in matrix products"


def test_rates_of_a_busy_machine_are_measured_again_and_those_of_an_idle_one_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    measured(monkeypatch, BUSY, cores=0.3)
    assert rates.cpu_ceilings().origin.endswith("5 GFLOP/s in matrix products")
    measured(monkeypatch, IDLE, cores=1.0)
    assert rates.cpu_ceilings().origin.endswith("100 GFLOP/s in matrix products")
    left = measured(monkeypatch, BUSY, cores=1.0)
    assert rates.cpu_ceilings().matmul_flops_per_second == {"float32": 7.5e10}
    assert left == [BUSY]
