"""On local paths nothing asks the network: not plan, check, train, export or report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_run import save_tiny_model, write_config, write_dialogues

SOURCE = Path(__file__).parent.parent / "src"
REFUSING = """
import socket, sys

def refused(*arguments, **_):
    raise AssertionError(f"the network was asked: {{arguments}}")

class NoSocket(socket.socket):
    def __init__(self, family=socket.AF_INET, *arguments, **options):
        if family in (socket.AF_INET, socket.AF_INET6, -1):
            refused("socket", family)
        super().__init__(family, *arguments, **options)

socket.socket = NoSocket
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refused)
from fitune.cli.app import main
for arguments in {commands!r}:
    code = main(arguments)
    if code:
        sys.exit(f"{{arguments}} ended with {{code}}")
"""


def run_refused(place: Path, commands: list[list[str]]) -> None:
    environment = {
        **{key: value for key, value in os.environ.items() if "PROXY" not in key.upper()},
        "PYTHONPATH": str(SOURCE), "FITUNE_CACHE": str(place / "cache"), "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", REFUSING.format(commands=commands)],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the network was asked" not in done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    write_config(tmp_path / "sft.yaml")
    return tmp_path


def test_no_verb_on_local_paths_asks_the_network(place: Path) -> None:
    given = [
        "sft.yaml",
        "model.method=lora",
        "train.steps=2",
        "batch.micro=1",
        "loss=full",
        "model.recompute=off",
    ]
    run_refused(
        place,
        [
            ["check", *given],
            ["plan", *given, "--gpu", "RTX 4090", "--format", "quiet"],
            ["train", *given],
            ["report", "runs/run"],
            ["export", "runs/run", "--to", "hf", "-o", "exported"],
            [
                "plan",
                "exported",
                "--gpu",
                "cpu",
                "batch.micro=1",
                "loss=full",
                "model.recompute=off",
            ],
        ],
    )
