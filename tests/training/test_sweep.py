"""`fitune sweep`: what a sweep is read as, how it goes on, and the whole of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fitune.cli.sweep
from fitune.cli.app import main
from fitune.config import config_hash
from fitune.errors import ConfigError
from fitune.run.directory import RunDirectory
from fitune.run.sweep import read_states, read_sweep
from written_runs import Recipe, write_run

BASE: dict[str, Any] = {
    "model": {"source": "tiny"},
    "data": {"train": "sft.jsonl"},
    "run": {"name": "three"},
}
THREE = [
    {"batch.micro": 6, "batch.accumulation": 1, "optim.lr": 3e-5},
    {"batch.micro": 6, "batch.accumulation": 4, "optim.lr": 6e-5},
    {"batch.micro": 4, "batch.accumulation": 6, "optim.lr": 6e-5},
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(sweep: Any, **sections: Any) -> Path:
    path = Path("sweep.yaml")
    path.write_text(yaml.safe_dump(BASE | sections | {"sweep": sweep}))
    return path


def test_a_list_is_one_run_an_entry_named_by_what_it_sets() -> None:
    found = read_sweep(write(THREE))
    assert [entry.name for entry in found.entries] == ["6x1-lr3e-05", "6x4-lr6e-05", "4x6-lr6e-05"]
    assert [entry.config.batch.rows_per_step for entry in found.entries] == [6, 24, 24]
    assert {entry.config.run.output for entry in found.entries} == {Path("runs/three")}


def test_a_grid_is_every_combination() -> None:
    found = read_sweep(write({"optim.lr": [1e-5, 3e-5], "batch.micro": [2, 4, 8]}))
    assert len(found.entries) == 6
    assert len({config_hash(entry.config) for entry in found.entries}) == 6


def test_all_runs_share_seed_data_and_what_was_typed() -> None:
    found = read_sweep(write(THREE), ["train.seed=5", "optim.lr=1"])
    assert {entry.config.train.seed for entry in found.entries} == {5}
    assert [entry.config.optim.lr for entry in found.entries] == [
        3e-5,
        6e-5,
        6e-5,
    ]  # the sweep's own keys count


def test_a_rate_without_a_dot_is_a_number() -> None:
    Path("sweep.yaml").write_text(
        "model: {source: tiny}\ndata: {train: a}\nsweep: {optim.lr: [5e-7, 1e-6]}\n"
    )
    assert [entry.config.optim.lr for entry in read_sweep(Path("sweep.yaml")).entries] == [
        5e-7,
        1e-6,
    ]


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        (None, "has no key 'sweep'"),
        (
            [{"optim.lrr": 1}],
            "run 1 of the sweep: command line: unknown key 'optim.lrr': did you mean 'optim.lr'",
        ),
        ([3], "run 1 of the sweep is no set of keys"),
        ({"optim.lr": 3e-5}, "sweep.optim.lr must be a list of values"),
        ([{"optim.lr": 1e-5}, {"optim.lr": 1e-5}], "two runs of the sweep are called lr1e-05"),
        ({"train.seed": list(range(201))}, "has 201 runs"),
        ({"search": {"optim.lr": {"low": 1}}}, "sweep.search.optim.lr must be a list of choices"),
        ({"search": {"optim.lr": [1]}, "trials": 0}, "sweep.trials is 0"),
        ({"search": {"optim.lr": [1]}, "trails": 3}, "sweep.trails is unknown"),
    ],
)
def test_a_fault_of_a_sweep_is_one_sentence(sweep: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("'", ".").replace("(", ".")):
        read_sweep(write(sweep))


def test_training_a_sweep_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write(THREE))]) == 2
    assert "fitune sweep" in capsys.readouterr().err


class Trainer:
    """Stands for the processes of plans and runs: writes what `fitune train` would."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, too_large: str = "", failing: str = ""
    ) -> None:
        self.trained: list[list[str]] = []
        self.too_large, self.failing = too_large, failing
        monkeypatch.setattr(fitune.cli.sweep, "ProcessPoolExecutor", lambda *_, **__: self)
        monkeypatch.setattr(fitune.cli.sweep, "plan_content", self.plan)
        monkeypatch.setattr(fitune.cli.sweep.subprocess, "run", self.run)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, function: Any, values: Any) -> list[Any]:
        return [function(value) for value in values]

    def plan(self, config: Any) -> dict[str, Any]:
        fits = config.run.name != self.too_large
        candidate = {
            "predicted_device_bytes": 2**30,
            "predicted_reserved_bytes": 2**30,
            "categories": {},
        }
        plan = {"candidates": [candidate], "chosen": 0 if fits else None, "budget_bytes": 2**31}
        return {"plan": plan} | ({} if fits else {"state": "does not fit"})

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.trained.append(command[4:])
        config = read_sweep_config(Path(command[4]))
        name = config.run.name
        if name == self.failing:
            return subprocess.CompletedProcess(command, 1)
        assert isinstance(config.batch.micro, int)
        assert isinstance(config.batch.accumulation, int)
        assert isinstance(config.optim.lr, float)
        recipe = Recipe(
            micro=config.batch.micro, accumulation=config.batch.accumulation, lr=config.optim.lr,
            steps=480 // config.batch.rows_per_step,
        )  # fmt: skip
        path = write_run(config.run.output, name, recipe)
        summary = RunDirectory(path).summary
        content = json.loads(summary.read_text()) | {"config_hash": config_hash(config)}
        summary.write_text(json.dumps(content))
        return subprocess.CompletedProcess(command, 0)


def read_sweep_config(path: Path) -> Any:
    from fitune.config import read_config

    return read_config(path).config


def test_a_sweep_ends_with_a_comparison_and_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(monkeypatch)
    assert main(["sweep", str(write(THREE))]) == 0
    shown = capsys.readouterr()
    assert "6x4-lr6e-05 and 4x6-lr6e-05 are the same run" in " ".join(shown.out.split())
    assert "plan  6x1-lr3e-05: fits: 1.0 GiB of 2.0 GiB" in shown.err
    assert Path("runs/three/report.html").exists()
    assert Path("runs/three/4x6-lr6e-05/plan.json").exists()


def test_what_does_not_fit_is_said_first_left_out_and_stands_in_the_comparison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(monkeypatch, too_large="6x4-lr6e-05")
    assert main(["sweep", str(write(THREE))]) == 0
    shown = capsys.readouterr()
    assert shown.err.index("6x4-lr6e-05: does not fit") < shown.err.index("run 1 of 3")
    assert len(trainer.trained) == 2
    assert "6x4-lr6e-05 does not fit: it needs 1.0 GiB of 2.0 GiB" in " ".join(shown.out.split())


def test_a_failed_run_does_not_end_the_sweep_and_the_same_command_tries_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(monkeypatch, failing="6x1-lr3e-05")
    assert main(["sweep", str(write(THREE))]) == 1
    assert "1 of 3 runs failed (6x1-lr3e-05)" in capsys.readouterr().err
    trainer = Trainer(monkeypatch)
    assert main(["sweep", str(write(THREE))]) == 0
    assert [Path(arguments[0]).stem for arguments in trainer.trained] == ["6x1-lr3e-05"]
    assert [state["state"] for state in read_states(Path("runs/three")).values()] == [
        "finished"
    ] * 3


def test_an_entry_that_was_changed_is_planned_and_trained_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Trainer(monkeypatch)
    main(["sweep", str(write(THREE))])
    trainer = Trainer(monkeypatch)
    main(["sweep", str(write(THREE, train={"seed": 3}))])
    assert len(trainer.trained) == 3
    assert all(arguments[-1] == "--overwrite" for arguments in trainer.trained)


def test_a_dry_run_only_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch)
    assert main(["sweep", str(write(THREE)), "--dry-run"]) == 0
    assert trainer.trained == []


def test_a_sweep_of_which_nothing_fits_ends_with_exit_code_3(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Trainer(monkeypatch, too_large="6x1-lr3e-05")
    assert main(["sweep", str(write(THREE[:1]))]) == 3


def test_a_search_chooses_its_runs_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    trainer = Trainer(monkeypatch)
    monkeypatch.setattr(
        trainer, "submit", lambda function, config: Result(function(config)), raising=False
    )
    batch = {"micro": 6, "accumulation": 4}
    space = {"optim.lr": {"low": 1e-5, "high": 1e-3, "log": True}}
    assert main(["sweep", str(write({"search": space, "trials": 2}, batch=batch))]) == 0
    assert main(["sweep", str(write({"search": space, "trials": 3}, batch=batch))]) == 0
    assert [Path(arguments[0]).stem for arguments in trainer.trained] == [
        "trial-0000",
        "trial-0001",
        "trial-0002",
    ]


class Result:
    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


@pytest.mark.thorough
def test_a_whole_sweep_trains_in_processes_and_finds_two_splits_to_be_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_run import save_tiny_model, write_dialogues

    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny")
    write_dialogues(tmp_path / "sft.jsonl", 60)
    path = write(
        THREE[1:],
        data={"train": "sft.jsonl", "eval_fraction": 0.2, "max_length": 64},
        train={"steps": 2},
    )
    source = Path(__file__).parents[2] / "src"
    code = f"import sys; sys.path.insert(0, {str(source)!r}); from fitune.cli.app import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "sweep", str(path), "--format", "json"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["checks"][0]["same"]
    assert content["runs"][1]["eval_difference"]["num_pairs"] >= 5
    assert Path("runs/three/report.html").stat().st_size < 3_000_000
