"""A Trainer's run with our callback: the same run, and a directory that the commands read."""

from pathlib import Path
from typing import Any

import pytest

import fitune
from fitune.cli.app import main
from fitune.integrations.transformers import FituneCallback
from fitune.run.directory import read_run
from fitune.run.memory import read_memory
from fitune.run.metrics import read_metrics
from tiny_trainers import hf_trainer, needs_trl, sft_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
MAKE = pytest.mark.parametrize("make", [hf_trainer, pytest.param(sft_trainer, marks=needs_trl)], ids=["hf", "trl"])


@MAKE
def test_the_run_is_the_same_bit_for_bit(make: Any, tmp_path: Path) -> None:
    plain, watched = make(tmp_path), make(tmp_path, callbacks=[FituneCallback(tmp_path / "runs", "first")])
    plain.train()
    watched.train()
    for name in ("loss", "grad_norm"):
        assert [log.get(name) for log in watched.state.log_history] == [
            log.get(name) for log in plain.state.log_history
        ]
    found, wanted = watched.model.state_dict(), plain.model.state_dict()
    assert all(found[name].equal(wanted[name]) for name in wanted)


@MAKE
def test_its_directory_holds_the_run(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path, gradient_accumulation_steps=2)
    callback = FituneCallback(tmp_path / "runs", "first", prediction=fitune.predict_trainer(trainer, gpu="cpu"))
    trainer.add_callback(callback)
    trainer.train()
    assert callback.run is not None
    record = read_run(callback.run.path)
    assert record.state == "finished"
    assert record.summary is not None
    assert record.summary.steps == 4
    assert record.summary.predicted_allocated_bytes is not None
    steps = read_metrics(callback.run.metrics).steps
    assert [step.loss for step in steps] == [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert steps[0].num_micro_batches == 2
    assert steps[0].micro_batch == 4
    assert 0 < steps[0].supervised_tokens < steps[0].tokens
    assert read_memory(callback.run.memory)
    assert main(["compare", str(callback.run.path)]) == 0
    assert main(["watch", str(callback.run.path), "--once"]) == 0
    assert "first" in capsys.readouterr().out
