"""The benchmark of published SFTTrainer runs through `predict_trainer`, on its smallest rows."""

import re

import pytest

import trainer_accuracy
from tiny_trainers import needs_trl

ROWS = {row["id"]: row for row in trainer_accuracy.published_rows()}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@needs_trl
@pytest.mark.parametrize(
    ("name", "bound"),  # errors: +0.0003 and 0.0000
    [
        ("fms-main-0", 0.0005),
        pytest.param("fms-granite-10", 0.0005, marks=pytest.mark.thorough),
    ],
)
def test_a_published_run_is_predicted_from_its_trainer_within(name: str, bound: float) -> None:
    compared = trainer_accuracy.compare_row(ROWS[name], today=False)
    assert abs(compared.error_fraction) < bound


def test_what_was_predicted_is_within_the_bound_or_says_why() -> None:
    results = trainer_accuracy.read_results()
    assert {row.id for row in results} <= set(ROWS)
    beyond = [row for row in results if abs(row.error_fraction) > trainer_accuracy.BOUND]
    assert len(beyond) < len(results) / 4
    assert all(row.assumed for row in beyond)


def test_the_page_names_every_row_that_was_predicted() -> None:
    page = "\n".join(trainer_accuracy.section())
    assert set(re.findall(r"^\| (fms-\S+) ", page, re.MULTILINE)) == {
        row.id for row in trainer_accuracy.read_results()
    }
