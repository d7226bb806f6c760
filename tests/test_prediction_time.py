"""The table of what a prediction takes."""

import prediction_time


def test_the_table_of_the_page_is_what_was_measured() -> None:
    taken = prediction_time.read_results()
    assert [each.name for each in taken] == list(prediction_time.RUNS)
    assert prediction_time.table(taken) in prediction_time.PAGE.read_text(encoding="utf-8")
