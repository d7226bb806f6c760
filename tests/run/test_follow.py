"""A run is followed by what its files gained, whatever happens to them."""

import errno
import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from fitune.report.run_on_disk import RunReader
from fitune.run.directory import RunDirectory, create_run, read_run
from fitune.run.follow import RunFollower
from fitune.run.metrics import append_line
from watched_run import NUM_STEPS, START, sample, step_metrics, write_lines, write_watched_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return write_watched_run(tmp_path)


def test_everything_is_read_at_first(run: RunDirectory) -> None:
    view = RunFollower(run).read()
    assert (len(view.steps), len(view.evals), len(view.events), len(view.samples)) == (
        NUM_STEPS,
        3,
        5,
        301,
    )
    assert (view.seconds, view.device_name) == (600.0, "NVIDIA GeForce RTX 4090")


def test_new_lines_are_added(run: RunDirectory) -> None:
    follower = RunFollower(run)
    follower.read()
    append_line(run.metrics, step_metrics(NUM_STEPS + 1))
    append_line(run.memory, sample(602.0), leave_out_unknown=True)
    view = follower.read()
    assert (view.steps[-1].step, len(view.steps), view.samples[-1].time) == (
        NUM_STEPS + 1,
        NUM_STEPS + 1,
        START + 602,
    )


def test_a_half_written_line_waits_for_its_end(run: RunDirectory) -> None:
    follower = RunFollower(run)
    line = json.dumps({"time": START + 700, "step": 401})
    with run.memory.open("a") as file:
        file.write(line[:20])
        file.flush()
        assert follower.read().samples[-1].time == START + 600
        file.write(line[20:] + "\n")
    assert follower.read().samples[-1].time == START + 700


def test_a_run_that_begins_again_is_read_anew(run: RunDirectory) -> None:
    follower = RunFollower(run)
    follower.read()
    write_lines(run.metrics, [step_metrics(1)])
    view = follower.read()
    assert (len(view.steps), view.evals, len(view.events)) == (1, (), 5)


def test_a_file_that_was_removed_is_empty(run: RunDirectory) -> None:
    follower = RunFollower(run)
    follower.read()
    run.events.unlink()
    assert follower.read().events == ()


def test_steps_done_again_after_a_resume_count_once(run: RunDirectory) -> None:
    follower = RunFollower(run)
    follower.read()
    append_line(run.metrics, replace(step_metrics(300), loss=9.0))
    view = follower.read()
    assert (view.steps[-1].loss, len(view.steps), view.evals[-1].step) == (9.0, 300, 200)


def test_only_the_end_of_a_long_memory_file_is_read(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.run.follow.TAIL_BYTES", 2000)
    view = RunFollower(run).read()
    assert 0 < len(view.samples) < 10
    assert view.samples[-1].time == START + 600


def test_seconds_at_work_are_those_of_the_summary_and_those_sampled_since(
    run: RunDirectory,
) -> None:
    os.utime(run.summary, (START + 590.0,) * 2)
    assert RunFollower(run).read().seconds == 610.0


def test_files_that_are_not_there_yet_are_empty(tmp_path: Path) -> None:
    view = RunFollower(create_run(tmp_path, "new")).read()
    assert (view.steps, view.samples, view.seconds, view.budget_bytes, view.device_name) == (
        (),
        (),
        None,
        None,
        None,
    )


@pytest.mark.parametrize(("silent_seconds", "state"), [(0, "running"), (120, "crashed")])
def test_without_locks_the_heartbeat_tells_who_runs(
    silent_seconds: int, state: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run.lock.write_text(json.dumps({"host": os.uname().nodename, "pid": 1}))
    os.utime(run.lock, (time.time() - silent_seconds,) * 2)
    assert read_run(run.path).state == state


def test_a_line_without_an_end_is_skipped_and_what_follows_is_read(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.run.growing_file._BLOCK_BYTES", 100)
    monkeypatch.setattr("fitune.run.growing_file.MAX_RECORD_BYTES", 2000)
    follower = RunFollower(run)
    with run.memory.open("a") as file:
        file.write("x" * 5000 + "\n")
    append_line(run.memory, sample(602.0), leave_out_unknown=True)
    assert follower.read().samples[-1].time == START + 602


def test_a_report_reads_what_watch_reads_while_the_run_goes_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.report.run_on_disk._BATCH_LINES", 50)
    follower, reader = RunFollower(run), RunReader(run.path)
    for change in (
        lambda: None,
        lambda: append_line(run.metrics, step_metrics(NUM_STEPS + 1)),
        lambda: append_line(run.metrics, replace(step_metrics(300), loss=9.0)),
        lambda: append_line(run.metrics, step_metrics(301)),
        lambda: write_lines(run.metrics, [step_metrics(1)]),
    ):
        change()
        view, recorded = follower.read(), reader.read()
        assert recorded.train["loss"].tolist() == [step.loss for step in view.steps]
        assert recorded.evals["step"].tolist() == [each.step for each in view.evals]
        assert recorded.memory["allocated_bytes"].tolist() == [
            each.allocated_bytes for each in view.samples
        ]
        assert recorded.events == view.events
