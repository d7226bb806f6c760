"""The benchmark against published measurements, on its smallest rows."""

import pytest

import accuracy
import published_loops

ROWS = {row["id"]: row for row in accuracy.read_rows()}


@pytest.mark.parametrize(
    ("name", "bound"),
    [("minimind795-L2", 0.002), ("nanogpt-gpt2-small", 0.0005)],  # errors: -0.0014 and -0.0001
)
def test_a_published_run_is_predicted_within(name: str, bound: float) -> None:
    error = accuracy.compare_row(ROWS[name]).error_fraction
    assert error is not None
    assert abs(error) < bound


def test_a_row_that_cannot_be_recorded_says_why() -> None:
    gptq = next(name for name, row in ROWS.items() if "GPTQ" in row.get("quantization", ""))
    compared = accuracy.compare_row(ROWS[gptq])
    assert compared.error_fraction is None
    assert compared.reason is not None
    assert "4-bit" in compared.reason


def test_a_bound_is_no_measurement() -> None:
    assert isinstance(published_loops.express(ROWS["minimind795-L128-OOM"]), published_loops.NotExpressed)


def test_the_page_names_every_row() -> None:
    compared = [accuracy.Compared(**accuracy._describe(row), reason="not run") for row in ROWS.values()]
    page = accuracy.render(compared)
    assert all(name in page for name in ROWS)
