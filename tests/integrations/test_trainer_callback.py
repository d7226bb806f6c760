"""A Trainer's run with our callback: the same run, and a directory that the commands read."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

import fitune
from faults import failing
from fitune.cli.app import main
from fitune.integrations.trainer_steps import StepReader
from fitune.integrations.transformers import FituneCallback, SafeSteps
from fitune.run.directory import read_run
from fitune.run.memory import read_run_memory
from fitune.run.metrics import read_events, read_metrics
from fitune.units import MIB
from tiny_steps import labelled, make_model
from tiny_trainers import hf_trainer, needs_trl, rows, sft_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
MAKE = pytest.mark.parametrize(
    "make", [hf_trainer, pytest.param(sft_trainer, marks=needs_trl)], ids=["hf", "trl"]
)


@MAKE
def test_the_run_is_the_same_bit_for_bit(make: Any, tmp_path: Path) -> None:
    plain, watched = (
        make(tmp_path),
        make(tmp_path, callbacks=[FituneCallback(tmp_path / "runs", "first")]),
    )
    plain.train()
    watched.train()
    for name in ("loss", "grad_norm"):
        assert [log.get(name) for log in watched.state.log_history] == [
            log.get(name) for log in plain.state.log_history
        ]
    found, wanted = watched.model.state_dict(), plain.model.state_dict()
    assert all(found[name].equal(wanted[name]) for name in wanted)


@MAKE
def test_its_directory_holds_the_run(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path, gradient_accumulation_steps=2)
    callback = FituneCallback(
        tmp_path / "runs", "first", prediction=fitune.predict_trainer(trainer, gpu="cpu")
    )
    trainer.add_callback(callback)
    trainer.train()
    assert callback.run is not None
    record = read_run(callback.run.path)
    assert record.state == "finished"
    assert record.summary is not None
    assert record.summary.steps == 4
    assert record.summary.predicted_allocated_bytes is not None
    steps = read_metrics(callback.run.metrics).steps
    assert [step.loss for step in steps] == [
        log["loss"] for log in trainer.state.log_history if "loss" in log
    ]
    assert steps[0].num_micro_batches == 2
    assert steps[0].micro_batch == 4
    assert 0 < steps[0].supervised_tokens < steps[0].tokens
    assert all(
        step.noise_signal is not None and step.noise_variance is not None for step in steps[1:]
    )
    assert steps[-1].noise_bounce is not None or steps[-1].noise_scale_tokens is not None
    assert read_run_memory(callback.run.memory)[-1].step == 4
    assert "monitor" not in [thread.name for thread in threading.enumerate()]
    assert main(["compare", str(callback.run.path)]) == 0
    assert main(["watch", str(callback.run.path), "--once"]) == 0
    assert "first" in capsys.readouterr().out


def test_steps_without_any_target_end_no_training(tmp_path: Path) -> None:
    data = rows().map(lambda row: {"labels": [-100] * len(row["labels"])})
    trainer = hf_trainer(
        tmp_path, callbacks=[FituneCallback(tmp_path / "runs", "first")], data=data, max_steps=2
    )
    assert trainer.train().global_step == 2


def test_an_alarm_is_kept_and_speaks_of_the_trainers_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    swapped = "fitune.watch.sampler._swapped_bytes"
    monkeypatch.setattr(swapped, lambda: 100 * MIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 * MIB, total=MIB**2))
    callback = FituneCallback(tmp_path / "runs", "first")
    hf_trainer(tmp_path, callbacks=[callback]).train()
    assert callback.run is not None
    said = {event.kind: event.message for event in read_events(callback.run.events)}
    assert "lower per_device_train_batch_size" in said["spill"]
    assert said["disk"] in caplog.text


@MAKE
def test_an_evaluation_is_a_line_of_its_own(make: Any, tmp_path: Path) -> None:
    callback = FituneCallback(tmp_path / "runs", "first")
    trainer = make(
        tmp_path,
        callbacks=[callback],
        eval_data=rows(),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert callback.run is not None
    evals = read_metrics(callback.run.metrics).evals
    assert [each.eval_loss for each in evals] == [
        log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    ]
    wanted = sum((torch.tensor(row[1:]) != -100).sum().item() for row in rows()["labels"])
    assert [each.eval_tokens for each in evals] == [wanted, wanted]


def test_rows_of_a_step_that_was_done_again_count_once(tmp_path: Path) -> None:
    class SafeTrainer(SafeSteps, Trainer):
        pass

    runs = []
    for calls in ((), (9, 10)):
        callback = FituneCallback(tmp_path / "runs", "safe-")
        trainer = hf_trainer(
            tmp_path, kind=SafeTrainer, callbacks=[callback], gradient_accumulation_steps=2
        )
        with failing(trainer.model, "backward of layer 0", *calls):
            trainer.train()
        assert callback.run is not None
        runs.append(read_metrics(callback.run.metrics).steps)
    clean, again = runs
    assert [step.supervised_tokens for step in again] == [step.supervised_tokens for step in clean]
    assert again[2].num_micro_batches > clean[2].num_micro_batches
    assert again[2].noise_signal is not None


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


def test_the_norms_are_those_of_the_micro_batches_and_of_their_sum_before_clipping() -> None:
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parts = (labelled((9, 4), (7, 2)), labelled((12, 11)))
    reader = StepReader(model, optimizer, clip=0.1, noise=True)
    for _ in range(2):  # the second finds Adam's averages
        own, before = [], torch.zeros(())
        for part in parts:
            model(**part, num_items_in_batch=17).loss.backward()
            own.append(((gradient(model) - before) ** 2).sum().item())
            before = gradient(model).clone()
        states = [optimizer.state[parameter] for parameter in model.parameters()]
        memory = torch.cat(
            [state["exp_avg"].flatten() for state in states if state] or [before * 0]
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms = reader.take().norms
        assert norms is not None
        assert norms.micro == pytest.approx(own, rel=1e-4)
        assert norms.total == pytest.approx((before**2).sum().item(), rel=1e-4)
        assert norms.weights == (6.0, 11.0)
        optimizer.step()
        optimizer.zero_grad()
    assert norms.momentum_dot == pytest.approx((before @ memory).item(), rel=1e-3)
    reader.close()
    model(**parts[0], num_items_in_batch=17).loss.backward()
    assert reader.take().num_forwards == 0
