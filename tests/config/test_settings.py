"""Every value of a setting trains: the loss of a tiny model falls, whatever the format, optimizer or layout."""

import json
from pathlib import Path

import pytest

from disturbed_run import predict_nothing
from fitune.cli.app import main
from fitune.model.load import build_model
from fitune.run.metrics import read_metrics
from tiny_models import TINY_LLAMA, save_tokenizer

PRECISIONS = ("float32", "bfloat16", "autocast_bfloat16", "autocast_float16")
SETTINGS = (
    *((f"model.precision={name}", f"model.method={method}") for name in PRECISIONS for method in ("full", "lora")),
    *((f"optim.name={name}",) for name in ("adamw_foreach", "adafactor", "sgd")),
    *((f"model.recompute={how}",) for how in ("every_2", "every_4", "selective", "full")),
    *((f"model.attention={how}",) for how in ("math", "eager")),
    ("loss=full",),
    ("loss=chunked",),
    ("data.packing=false",),
    ("data.packing=false", "batch.micro=3"),
    ("batch.micro_tokens=16",),
    ("batch.micro=2", "batch.accumulation=4"),
    ("data.mask=all",),
    ("eval.micro=3",),
    *((f"optim.schedule={name}",) for name in ("linear", "constant", "wsd")),
)  # fmt: skip


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("settings")
    build_model(TINY_LLAMA, seed=0).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    with (directory / "data.jsonl").open("w") as file:
        for number in range(40):
            words = " ".join(f"w{(number + place) % 5}" for place in range(1 + number % 7))
            messages = [
                {"role": "user", "content": f"w{number % 9}"},
                {"role": "assistant", "content": words},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return directory


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_the_loss_falls_with(
    overrides: tuple[str, ...], fixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_nothing(monkeypatch)
    monkeypatch.setenv("FITUNE_CACHE", str(fixture / "cache"))
    rate = "optim.lr=0.5" if "optim.name=sgd" in overrides else "optim.lr=0.02"
    words = (
        "train", f"model.source={fixture / 'model'}", f"data.train={fixture / 'data.jsonl'}", "data.eval_fraction=0.1",
        "train.steps=8", "train.eval_every=8", rate, "optim.warmup=0.0", f"run.output={tmp_path}", "run.name=run",
        *(() if "batch.micro=2" in overrides else ("batch.effective=8",)), *overrides, "--format", "quiet",
    )  # fmt: skip
    assert main(words) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics.evals[-1].eval_loss < metrics.evals[0].eval_loss
    assert len(metrics.steps) == 8
