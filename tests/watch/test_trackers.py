"""Every tracker's own files, read with its own library, hold what the run measured."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from fitune.cli.app import main
from fitune.config.values import Tracker
from fitune.run.directory import RunDirectory
from fitune.run.metrics import read_events, read_metrics
from tiny_run import save_tiny_model, write_config, write_dialogues

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tracked")
    save_tiny_model(directory / "tiny")
    write_dialogues(directory / "sft.jsonl")
    write_config(directory / "sft.yaml")
    return directory


def tracked_run(place: Path, name: str) -> RunDirectory:
    """Three steps, in a process of their own: a tracker changes much of the one that it is loaded into."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "FITUNE_CACHE": str(place / "cache")}
    environment["TRACKIO_DIR"] = str(place / "trackio")
    arguments = [
        "train.steps=3",
        "train.eval_every=1",
        f"run.trackers=[{name}]",
        f"run.name={name}",
        "--format",
        "quiet",
    ]
    command = [sys.executable, "-m", "fitune", "train", "sft.yaml", *arguments]
    done = subprocess.run(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"runs/{name}\n"
    return RunDirectory(place / "runs" / name)


def losses(run: RunDirectory) -> dict[int, float]:
    return {step.step: step.loss for step in read_metrics(run.metrics).steps}


def last_event(run: RunDirectory) -> str:
    return read_events(run.events)[-1].message


def records(path: Path) -> Iterator[bytes]:
    """Of LevelDB's log format, in which wandb and swanlab write: blocks of 32 KiB, after a head of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_tensorboard_holds_the_run(place: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked_run(place, "tensorboard")
    found = EventAccumulator(str(run.trackers / "tensorboard"))
    found.Reload()
    assert {scalar.step: scalar.value for scalar in found.Scalars("train/loss")} == pytest.approx(
        losses(run)
    )
    assert [scalar.step for scalar in found.Scalars("eval/loss")] == [0, 1, 2, 3]
    (event,) = found.Tensors("event/text_summary")
    assert event.tensor_proto.string_val[0].decode() == last_event(run)
    (parameters,) = run.trackers.glob("tensorboard/*/hparams.yml")
    assert "optim.lr: 0.01" in parameters.read_text()


def test_trackio_holds_the_run(place: Path) -> None:
    pytest.importorskip("trackio")
    run = tracked_run(place, "trackio")
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as store; "
        "print(json.dumps([store.get_logs('fitune', 'trackio'), store.get_run_config('fitune', 'trackio')]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(place / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    logs, config = json.loads(done.stdout)
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == pytest.approx(
        losses(run)
    )
    assert [log["event"] for log in logs if "event" in log] == [last_event(run)]
    assert config["optim.lr"] == 0.01


def test_wandb_holds_the_run_offline(place: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run = tracked_run(place, "wandb")
    (path,) = run.trackers.glob("wandb/offline-run-*/*.wandb")
    seen: dict[int, float] = {}
    text = b""
    for content in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        text += content
        items = {
            tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item
        }
        if ("train/loss",) in items:
            seen[int(items["train/step",])] = json.loads(items["train/loss",])
    assert seen == pytest.approx(losses(run))
    assert b"optim.lr" in text
    assert last_event(run).encode() in text
    (summary,) = path.parent.glob("files/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"


def test_mlflow_holds_the_run_and_its_files(place: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # mlflow-skinny has no store
    run = tracked_run(place, "mlflow")
    code = (
        "import json, mlflow; "
        f"client = mlflow.MlflowClient('sqlite:///{place}/runs/mlflow.db'); "
        "experiment = client.get_experiment_by_name('fitune').experiment_id; "
        "(run,) = client.search_runs([experiment]); "
        "print(json.dumps([[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, 'train/loss')], "
        "run.data.params, [f.path for f in client.list_artifacts(run.info.run_id)]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    history, parameters, files = json.loads(done.stdout.splitlines()[-1])
    assert dict(map(tuple, history)) == pytest.approx(losses(run))
    assert parameters["optim.lr"] == "0.01"
    assert {"config.yaml", "summary.json", "metrics.jsonl", "events.jsonl"} <= set(files)


def test_swanlab_holds_the_run_offline(place: Path) -> None:
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1 import record_pb2

    run = tracked_run(place, "swanlab")
    (path,) = run.trackers.glob("swanlab/run-*/*.swanlab")
    seen = {}
    for content in records(path):
        record = record_pb2.Record()
        record.ParseFromString(content)
        if record.scalar.key == "train/loss":
            seen[record.scalar.step] = record.scalar.value.number
    assert seen == pytest.approx(losses(run), rel=1e-5)
    assert any(last_event(run) in file.read_text() for file in path.parent.glob("media/**/*.txt"))


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "sft.yaml", "run.trackers=[trackio, wandb]", "run.name=refused"]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: run.trackers: trackio is not installed: pip install trackio",
        "error: run.trackers: wandb is not installed: pip install wandb",
    ]
    assert not Path("runs/refused").exists()


def test_an_unknown_tracker_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--model", "m", "--data", "d", "run.trackers=[aimless]", "--print-config"])
        == 2
    )
    *names, last = get_args(Tracker)
    assert f"each {', '.join(names)} or {last}" in capsys.readouterr().err


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from fitune.watch.trackers import Tracked
    from watched_run import step_metrics

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the network is gone")

    said: list[str] = []
    tracked = Tracked(
        "wandb", SimpleNamespace(log=fail, finish=fail), RunDirectory(tmp_path), said.append
    )
    for step in (1, 2, 3):
        tracked.step(step_metrics(step), progress=0.5)
    tracked.finish()
    assert said == ["warning: wandb failed and may be incomplete: the network is gone"]
