"""Whole runs and plans on a real card. Skipped without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from fitune.cli.app import main
from fitune.run.metrics import read_summary
from fitune.units import MIB
from tiny_run import write_config, write_dialogues

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card: none is here"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    write_dialogues(Path("sft.jsonl"))
    write_config(
        Path("sft.yaml"),
        {
            "model": {
                "source": "minimind2-small",
                "init": "random",
                "tokenizer": "tokenizer",
                "recompute": "off",
            },
            "batch": {"micro": 4},
            "train": {"steps": 2},
        },
    )
    return tmp_path


@pytest.mark.parametrize(
    "override", ["loss=chunked", "model.method=lora", "model.precision=bfloat16"]
)
def test_a_run_reserves_what_it_predicted(place: Path, override: str) -> None:
    subprocess.run([sys.executable, "-m", "fitune", "train", "sft.yaml", override], check=True)
    summary = read_summary(place / "runs" / "run" / "summary.json")
    predicted, measured = summary.predicted_reserved_bytes, summary.measured_reserved_bytes
    assert predicted is not None
    assert measured is not None
    assert abs(predicted - measured) <= max(
        0.01 * measured, 2 * MIB
    )  # 2 MiB: the smallest piece that is reserved


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["adamw_host", "adafactor"])
def test_an_optimizer_trains_on_the_card(name: str) -> None:
    assert main(["train", "sft.yaml", f"optim.name={name}", "loss=chunked"]) == 0


@pytest.mark.usefixtures("place")
def test_a_plan_starts_no_cuda() -> None:
    code = (
        "import torch; from fitune.cli.app import main; assert main(['plan', 'sft.yaml']) == 0; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
