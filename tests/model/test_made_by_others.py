"""A run's directory that somebody else made runs no code, asks no hub and hangs no command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from disturbed_run import predict_nothing
from fitune.cli.app import main
from tiny_run import save_tiny_model, write_config, write_dialogues


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run of adapters."""
    directory = tmp_path_factory.mktemp("finished")
    save_tiny_model(directory / "tiny")
    write_dialogues(directory / "sft.jsonl")
    write_config(directory / "sft.yaml", {"train": {"steps": 2}, "model": {"method": "lora"}})
    with pytest.MonkeyPatch.context() as patched:
        predict_nothing(patched)
        patched.chdir(directory)
        assert main(["train", "sft.yaml"]) == 0
    return directory


@pytest.fixture
def run(finished: Path, place: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, place, dirs_exist_ok=True)
    return place / "runs" / "run"


def trust(run: Path, mark: Path) -> None:
    """The run now says that the model's own code runs, which touches `mark`."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    tiny = run.parent.parent / "tiny"
    content = json.loads((tiny / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"}
    }
    (tiny / "config.json").write_text(json.dumps(content))
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nfrom transformers import LlamaForCausalLM as Evil\n"
    (tiny / "evil.py").write_text(code)


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        (["train", "--resume", "runs/run"], "add model.trust_remote_code=true to this command"),
        (["export", "runs/run", "--to", "hf"], "add --trust-remote-code"),
    ],
)
def test_the_switch_that_runs_code_comes_from_who_calls(
    command: list[str], way_out: str, run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust(run, place / "ran")
    assert main(command) == 2
    assert way_out in " ".join(capsys.readouterr().err.split())
    assert not (place / "ran").exists()


def test_the_switch_is_not_asked_for_where_no_code_comes_with_the_model(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", "runs/run", "--to", "hf", "-o", "merged"]) == 0
    assert Path("merged", "model.safetensors").is_file()


def test_a_switch_of_export_that_has_no_effect_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/run", "--to", "hf", "--trust-remote-code"]) == 2
    assert "drop --trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "owner/evil"}}, "is not of LoRA adapters"),
        ({"r": 50_000_000}, "says r: 50000000"),
        ({"target_modules": "(([a-z._0-9]+)+)+!"}, "sets target_modules"),
        ({"layer_replication": [[0, 2]] * 3}, "sets layer_replication"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
    ],
)
def test_adapters_that_ask_peft_for_more_than_adapters_are_refused(
    keys: dict[str, Any], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of another kind asks the hub, a huge rank takes all memory, a regular expression never ends."""
    directory = run / ("best" if (run / "best").is_dir() else "last")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    assert main(["export", "runs/run", "--to", "hf"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
