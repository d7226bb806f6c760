"""The run directory: created once, never replaced by accident, and its state told from outside."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fitune.errors import RunDirectoryError
from fitune.run.directory import (
    RunDirectory,
    create_run,
    list_runs,
    name_prefix,
    open_run,
    read_run,
    working_on,
)
from fitune.run.files import write_atomically, write_json
from fitune.run.metrics import Status, Summary, summary_json


def write_summary(run: RunDirectory, status: Status) -> None:
    write_json(run.summary, summary_json(Summary(status=status)))


def test_a_new_run_is_a_run(tmp_path: Path) -> None:
    run = create_run(tmp_path / "deep" / "runs", "a")
    assert open_run(run.path) == run
    assert run.checkpoints.is_dir()


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    run.metrics.write_text("kept")
    with pytest.raises(RunDirectoryError, match="--overwrite"):
        create_run(tmp_path, "a")
    assert run.metrics.read_text() == "kept"


def test_a_run_that_never_began_may_be_taken(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    (run.path / ".config.yaml.123").write_text("half")
    assert create_run(tmp_path, "a") == run


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    run.metrics.write_text("old")
    (run.checkpoints / "step-1").mkdir()
    (run.path / "notes.txt").write_text("mine")
    create_run(tmp_path, "a", overwrite=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "lock", "notes.txt"]
    assert not list(run.checkpoints.iterdir())


def test_a_directory_that_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not a run"):
        create_run(tmp_path, "a", overwrite=True)
    assert (tmp_path / "a" / "config.yaml").read_text() == "mine"


def test_an_empty_directory_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert open_run(create_run(tmp_path, "a").path)


def test_a_run_at_work_is_not_overwritten(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    with working_on(run), pytest.raises(RunDirectoryError, match=f"process {os.getpid()}"):
        create_run(tmp_path, "a", overwrite=True)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a"])
def test_a_name_is_the_name_of_a_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not the name of a directory"):
        create_run(tmp_path, name)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"is not a directory, and run.output needs one"):
        create_run(tmp_path / "file" / "runs", "a")


def test_automatic_names_count_up(tmp_path: Path) -> None:
    prefix = name_prefix("org/MiniMind2", "data/sft_2048.jsonl#500")
    assert [create_run(tmp_path, prefix).name for _ in range(2)] == [
        f"MiniMind2-sft_2048-000{n}" for n in (1, 2)
    ]


def test_names_never_repeat_when_runs_start_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: create_run(tmp_path, "a-").name, range(24)))
    assert len(set(names)) == 24


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("a/b.gguf", "b-d-"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B-d-"),
        ("./out/", "out-d-"),
        ("a b", "a_b-d-"),
    ],
)
def test_names_come_from_model_and_data(model: str, prefix: str) -> None:
    assert name_prefix(model, "d.jsonl") == prefix


def test_only_one_process_works_on_a_run(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    with (
        working_on(run),
        pytest.raises(RunDirectoryError, match="being worked on"),
        working_on(run),
    ):
        pass


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_the_state_of_a_run_that_ended_is_what_it_said(status: Status, tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    with working_on(run):
        write_summary(run, status)
        assert read_run(run.path).state == "running"
    assert read_run(run.path).state == status


def test_a_killed_process_leaves_a_crashed_run_that_another_may_take(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    write_summary(run, "running")
    code = (
        "import sys, time; from pathlib import Path; from fitune.run.directory import open_run, working_on\n"
        "with working_on(open_run(Path(sys.argv[1]))): print('ready', flush=True); time.sleep(60)"
    )
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen(
        [sys.executable, "-c", code, run.path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        assert read_run(run.path).state == "running"
        process.kill()
    assert read_run(run.path).state == "crashed"
    with working_on(run):
        pass


@pytest.mark.parametrize(("silent_seconds", "state"), [(5, "running"), (600, "crashed")])
def test_a_run_on_another_machine_lives_while_its_heart_beats(
    silent_seconds: float, state: str, tmp_path: Path
) -> None:
    run = create_run(tmp_path, "a")
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(run.lock, (time.time() - silent_seconds,) * 2)
    assert read_run(run.path).state == state


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.run.lock.HEARTBEAT_SECONDS", 0.01)
    run = create_run(tmp_path, "a")
    with working_on(run):
        os.utime(run.lock, (1, 1))
        deadline = time.monotonic() + 5
        while run.lock.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.lock.stat().st_mtime > 1


def test_runs_are_listed_with_the_latest_last(tmp_path: Path) -> None:
    for name in ("b", "a"):
        run = create_run(tmp_path, name)
        for path in (run.lock, run.path):
            os.utime(path, (1000, 1000) if name == "a" else (2000, 2000))
    (tmp_path / "no run").mkdir()
    assert [record.run.name for record in list_runs(tmp_path)] == ["a", "b"]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    create_run(tmp_path, "a")
    create_run(tmp_path, "b").summary.write_text("{")
    records = {record.run.name: record for record in list_runs(tmp_path)}
    assert (records["a"].state, records["b"].state) == ("crashed", "damaged")
    assert "summary.json" in str(records["b"].fault)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunDirectoryError, match="No space left"):
        write_atomically(tmp_path / "plan.json", "new")
    assert not list(tmp_path.iterdir())
