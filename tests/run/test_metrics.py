"""Metrics lines: what is written is read back, whatever happened to the writer."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fitune.errors import RunDirectoryError
from fitune.run.files import write_json
from fitune.run.metrics import (
    EvalMetrics,
    RunEvent,
    StepMetrics,
    Summary,
    append_line,
    read_events,
    read_metrics,
    read_summary,
    summary_json,
)

STEP = StepMetrics(
    step=1, tokens=100, supervised_tokens=60, total_tokens=100, loss=2.5, lr=1e-4, grad_norm=1.0, seconds=0.5,
    tokens_per_second=200.0, num_micro_batches=4, micro_batch=6,
)  # fmt: skip
EVAL = EvalMetrics(
    step=1,
    total_tokens=100,
    eval_loss=2.25,
    eval_perplexity=2.5,
    eval_accuracy=0.5,
    eval_tokens=10,
    seconds=0.1,
)
SUMMARY_KEYS = (
    "schema status steps total_steps tokens supervised_tokens seconds tokens_per_second train_loss eval_loss "
    "best_eval_loss predicted_allocated_bytes predicted_reserved_bytes measured_allocated_bytes "
    "measured_reserved_bytes measured_device_bytes peak_allocated_bytes peak_reserved_bytes peak_device_bytes "
    "num_ooms num_retries micro_batch_changes effective_batch config_hash data_hash"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_lines_are_read_back(path: Path) -> None:
    step = replace(STEP, peak_allocated_bytes=123, noise_ratio=0.5)
    append_line(path, step)
    append_line(path, EVAL)
    metrics = read_metrics(path)
    assert (metrics.steps, metrics.evals, metrics.damaged_lines) == ((step,), (EVAL,), ())


def test_unknown_is_null(path: Path) -> None:
    append_line(path, STEP)
    assert json.loads(path.read_text())["peak_allocated_bytes"] is None


def test_a_diverged_loss_stays_visible_in_valid_json(path: Path) -> None:
    append_line(path, replace(STEP, loss=math.nan, grad_norm=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    (step,) = read_metrics(path).steps
    assert math.isnan(step.loss)
    assert step.grad_norm == math.inf


def test_a_half_written_last_line_is_passed_over(path: Path) -> None:
    append_line(path, STEP)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    metrics = read_metrics(path)
    assert (metrics.steps, metrics.damaged_lines) == ((STEP,), ())


def test_a_line_after_a_half_written_one_is_whole(path: Path) -> None:
    path.write_text('{"step": 1, "lo')
    append_line(path, STEP)
    metrics = read_metrics(path)
    assert (metrics.steps, metrics.damaged_lines) == ((STEP,), (1,))


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", "\x00\x00", '{"eval_loss": "low"}', '{"step": 1.5}']
)
def test_a_damaged_line_is_reported_by_its_number(line: str, path: Path) -> None:
    append_line(path, STEP)
    with path.open("a") as file:
        file.write(f"{line}\n")
    append_line(path, replace(STEP, step=2))
    metrics = read_metrics(path)
    assert ([step.step for step in metrics.steps], metrics.damaged_lines) == ([1, 2], (2,))


def test_fields_of_a_later_version_are_passed_over(path: Path) -> None:
    append_line(path, STEP)
    path.write_text(path.read_text().replace('{"step"', '{"colour": "red", "step"'))
    assert read_metrics(path).steps == (STEP,)


def test_steps_done_again_after_a_resume_count_once(path: Path) -> None:
    for step in (1, 2, 3):
        append_line(path, replace(STEP, step=step))
        append_line(path, replace(EVAL, step=step))
    append_line(path, replace(STEP, step=2, loss=9.0))
    metrics = read_metrics(path)
    assert [(step.step, step.loss) for step in metrics.steps] == [(1, 2.5), (2, 9.0)]
    assert [evaluation.step for evaluation in metrics.evals] == [1]


def test_events_are_read_back(path: Path) -> None:
    event = RunEvent(time=1.5, step=3, kind="out_of_memory", message="步骤重做")
    append_line(path, event)
    assert read_events(path) == (event,)


def test_a_line_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        append_line(tmp_path, STEP)


def test_metrics_that_are_missing_are_said(path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        read_metrics(path)


def test_a_summary_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    assert " ".join(field.name for field in fields(Summary)) == SUMMARY_KEYS


def test_a_summary_is_read_back(tmp_path: Path) -> None:
    summary = Summary(status="finished", steps=3, train_loss=math.nan, config_hash="ab")
    write_json(tmp_path / "summary.json", summary_json(summary))
    again = read_summary(tmp_path / "summary.json")
    assert replace(again, train_loss=None) == replace(summary, train_loss=None)
    assert math.isnan(again.train_loss or 0)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "status": "great"}']
)
def test_a_damaged_summary_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"summary\.json"):
        read_summary(tmp_path / "summary.json")
