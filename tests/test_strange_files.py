"""A device or a FIFO where a configuration, a template or a note of a model is looked for is one sentence."""

import os
import sys
from pathlib import Path

import pytest

from fitune.cli.app import main
from fitune.errors import ModelError
from fitune.model.adapted_model import FILE, read_adapted
from fitune.model.lora import _check_adapters
from tiny_run import save_tiny_model, write_config, write_dialogues

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["train"], ["config", "import"], ["check"]])
def test_a_configuration_without_end_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("/dev/zero", "endless.yaml")
    assert main([*words, "endless.yaml"]) == 2
    assert (
        "endless.yaml has over 1,000,000 bytes, too many for a configuration"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["device", "FIFO"])
def test_a_template_without_end_is_refused(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(place / "tiny")
    write_dialogues(place / "sft.jsonl")
    write_config(place / "sft.yaml", {"train": {"steps": 2}})
    os.symlink("/dev/zero", "a device")
    os.mkfifo("a FIFO")
    assert main(["train", "sft.yaml", "--dry-run", f"data.template=a {kind}"]) == 2
    assert f"it is a {kind}, not an ordinary file" in capsys.readouterr().err


def test_a_fifo_beside_data_is_not_waited_for(place: Path) -> None:
    save_tiny_model(place / "tiny")
    (place / "rows").mkdir()
    write_dialogues(place / "rows" / "train.jsonl")
    os.mkfifo(place / "rows" / "README.md")
    assert main(["check", "--model", "tiny", "--data", "rows"]) == 0


def test_adapters_with_a_fifo_are_refused(place: Path) -> None:
    for name in (FILE, "adapter_config.json"):
        os.mkfifo(place / name)
    with pytest.raises(ModelError, match="it is a FIFO, not an ordinary file"):
        read_adapted(place)
    with pytest.raises(ModelError, match="it is a FIFO, not an ordinary file"):
        _check_adapters(place)
