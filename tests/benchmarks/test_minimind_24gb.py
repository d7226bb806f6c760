"""The table about minimind2 and 24 GB, on rows of 64 tokens."""

import pytest

import minimind_24gb
from fitune.allocator.prediction import Prediction
from minimind_24gb import (
    BEGIN,
    END,
    NUM_PARAMETERS,
    Line,
    formula_bytes,
    minimind_step,
    own_step,
    table,
    with_table,
)

SMALL = {"rows": 2, "length": 512}


@pytest.fixture(scope="module")
def own() -> Prediction:
    return own_step(**SMALL)


@pytest.fixture(scope="module")
def theirs() -> Prediction:
    return minimind_step(**SMALL)


def test_minimind_keeps_more_than_fitune_and_scores_more_than_both(
    own: Prediction, theirs: Prediction
) -> None:
    scores = minimind_step(fused=False, **SMALL)
    assert (
        own.categories["activation"]
        < theirs.categories["activation"]
        < scores.categories["activation"]
    )


def test_both_are_the_same_model(own: Prediction, theirs: Prediction) -> None:
    expected = 2 * 4 * NUM_PARAMETERS
    for prediction in (own, theirs):
        assert prediction.categories["optimizer_state"] == pytest.approx(expected, rel=0.01)


def test_a_line_is_compared_with_the_one_that_it_names(own: Prediction, theirs: Prediction) -> None:
    lines = list(table([(Line("a", own_step), own), (Line("b", minimind_step, 1), theirs)]))
    more = (theirs.peak_allocated_bytes - own.peak_allocated_bytes) / 2**30
    assert f"{more:+.2f} GiB to 1" in lines[-1]


def test_the_formula_counts_the_scores() -> None:
    layer = 2048 * 6 * 768 * (34 + 5 * 8 * 2048 / 768)
    assert formula_bytes(num_parameters=0) == round(16 * layer)


def test_the_table_replaces_the_one_before() -> None:
    page = with_table(f"head\n{BEGIN}\nold\n{END}\ntail\n", ["new"])
    assert "old" not in page
    assert with_table(page, ["new"]) == page
    assert page.startswith("head\n")
    assert page.endswith("\ntail\n")


def test_the_page_has_its_place_for_the_table() -> None:
    page = minimind_24gb.PAGE.read_text()
    assert page.index(BEGIN) < page.index(END)
