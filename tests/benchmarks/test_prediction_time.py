"""The tables of what a prediction and a first plan take."""

import prediction_time


def test_the_table_of_the_page_is_what_was_measured() -> None:
    taken = prediction_time.read_results()
    assert [each.name for each in taken] == list(prediction_time.RUNS)
    assert prediction_time.table(taken) in prediction_time.PAGE.read_text(encoding="utf-8")


def test_a_first_plan_answers_within_three_times_the_imports_and_ends_within_six() -> None:
    taken = prediction_time.read_plan_results()
    assert [each.name for each in taken] == list(prediction_time.PLANS)
    assert prediction_time.plan_table(taken) in prediction_time.PLAN_PAGE.read_text(
        encoding="utf-8"
    )
    assert all(each.first_seconds <= 3 * each.import_seconds for each in taken)
    assert all(each.table_seconds <= 6 * each.import_seconds for each in taken)
