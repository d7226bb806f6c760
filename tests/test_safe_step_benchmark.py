"""The benchmark of the safe step runs, and what it measures is far from the limits that matter."""

from safe_step import measure


def test_the_quick_benchmark_finds_no_large_cost() -> None:
    (cost,) = measure(quick=True)
    assert cost.num_pairs == 4
    assert -0.3 < cost.overhead_fraction < 0.3
    assert cost.extra_peak_bytes < 0.5 * cost.plain_peak_bytes
