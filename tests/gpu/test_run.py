"""Whole runs and plans on a real card. Skipped without one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from fitune.cli.app import main
from fitune.recovery.guard import Guard
from fitune.run.metrics import read_events, read_metrics, read_summary
from fitune.units import MIB
from tiny_run import write_config, write_dialogues, write_long_dialogues

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
    "override",
    ["loss=chunked", "model.method=lora", "model.precision=bfloat16", "batch.micro=2"],
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


#: Takes all of the card's memory but so many bytes, and holds it until its input ends.
TAKER = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def test_micro_batches_shrink_beside_another_process_and_grow_again_after_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before step 4 another process takes what this one gives back, but for half of what a step needs; it ends before
    step 10."""
    write_long_dialogues(Path("sft.jsonl"), 200)
    own = Guard.train
    takers: list[subprocess.Popen[str]] = []

    def train(self: Guard, batch: Any, micro_batches: Any, **options: Any) -> Any:
        if options["step"] == 4:
            needed = torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
            left = (needed - torch.cuda.memory_reserved()) // 2
            arguments = [sys.executable, "-c", TAKER, str(left)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            takers.append(subprocess.Popen(arguments, **pipes))  # type: ignore[call-overload]
            assert takers[0].stdout.readline() == "held\n"  # type: ignore[union-attr]
        if options["step"] == 10:
            takers[0].communicate()
        return own(self, batch, micro_batches, **options)

    monkeypatch.setattr(Guard, "train", train)
    settings = ["batch.effective=32", "batch.micro=auto", "train.steps=24"]
    assert main(["train", "sft.yaml", *settings]) == 0
    messages = [event.message for event in read_events(place / "runs" / "run" / "events.jsonl")]
    directions = [
        "shrink" if "micro-batches shrink" in message else "grow"
        for message in messages
        if message.startswith("micro-batches")
    ]
    assert directions[0] == "shrink", messages
    assert "grow" in directions, messages
    steps = read_metrics(place / "runs" / "run" / "metrics.jsonl").steps
    assert [step.step for step in steps] == [*range(1, 25)]
