"""What a run keeps for a comparison in pairs: the loss of each held-out row, and what the data is."""

import math
from pathlib import Path

import numpy as np

from fitune.data.report import length_histogram
from fitune.run.eval_rows import EvalRows, append_eval_rows, read_eval_rows

ROWS = EvalRows(step=3, total_tokens=300, losses=(1.5, 0.0, 2.25), weights=(4.0, 0.0, 7.0))


def test_the_rows_of_an_evaluation_are_read_back(tmp_path: Path) -> None:
    append_eval_rows(tmp_path / "rows", ROWS)
    assert read_eval_rows(tmp_path / "rows") == (ROWS,)


def test_a_diverged_evaluation_and_damaged_lines_leave_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    append_eval_rows(path, ROWS)
    append_eval_rows(path, EvalRows(step=4, total_tokens=400, losses=(math.nan,), weights=(1.0,)))
    with path.open("a") as file:
        file.write(
            '[]\n{"step": 5}\n{"step": 6, "total_tokens": 1, "losses": [1], "weights": []}\n{"st'
        )
    assert read_eval_rows(path) == (ROWS,)


def test_every_row_is_in_one_bin_of_the_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500, dtype=np.int32)
    histogram = length_histogram(lengths, 64)
    assert sum(histogram["counts"]) == 500
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert sum(length_histogram(np.array([8, 1], np.int32), 8)["counts"]) == 2
