"""A run that is stopped anywhere goes on as if it had not been: the same bits, and logs without gap or repetition."""

import datetime
import json
import math
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from disturbed_run import (
    RUN,
    STEPS,
    UNDISTURBED,
    assert_same,
    error_of,
    log,
    newest_step,
    train,
    train_until,
    weights,
)
from faults import failing_call
from fitune.cli.app import main as cli_main
from fitune.cli.progress import TrainingProgress
from fitune.config import read_config
from fitune.errors import OutOfMemoryError
from fitune.machine.process_memory import MemoryPeak
from fitune.model.lora import apply_lora
from fitune.model.tensor_file import write_tensors
from fitune.run.directory import RunDirectory, create_run, read_run, working_on
from fitune.run.journal import CHAIN_START, StepRecord, append_step, read_journal
from fitune.run.metrics import StepMetrics, read_events, read_metrics, read_summary
from fitune.training.checkpoint import content as checkpoint_content
from fitune.training.checkpoint.files import NUM_KEPT
from fitune.training.checkpoint.read import newest_checkpoint
from fitune.training.state import RunState
from tiny_models import TINY_QWEN3
from tiny_run import save_tiny_model

pytestmark = pytest.mark.usefixtures("disturbed")

KINDS = {
    "full": (),
    "lora": ("model.method=lora",),
    "lora with dropout": ("model.method=lora", "model.lora.dropout=0.3"),
    "dora": ("model.method=lora", "model.lora.dora=true", "model.lora.rslora=true"),
    "pissa": ("model.method=lora", "model.lora.rank=4", "model.lora.init=pissa"),
    "new tokens": ("model.method=lora", "model.new_tokens=[user, assistant]"),
    "label smoothing": ("train.label_smoothing=0.1",),
    "freeze": ("model.method=freeze", "model.freeze.trained_layers=1"),
    "head too": ("model.method=lora", "model.lora.modules_to_save=[lm_head, norm]"),
    "bfloat16": ("model.precision=bfloat16",),
    "autocast": ("model.precision=autocast_bfloat16",),
    "padded": ("data.packing=false",),
    "no evaluation": ("data.eval_fraction=0", "train.eval_every=auto"),
    "in epochs": ("train.steps=null", "train.epochs=1.5"),
    "a mixture with weights": ("data.train=[{path: sft.jsonl, weight: 1.5}]",),
    "sgd": ("optim.name=sgd",),
    "adafactor": ("optim.name=adafactor",),
    "muon": ("optim.name=muon",),
    "apollo": ("optim.name=apollo",),
    "recomputed": ("model.recompute=full",),
    "texts joined": ("data.train=texts.jsonl", "data.wrapped=true", "data.max_length=16"),
}


#: The others run in `make test-all`.
QUICK = (
    "full",
    "lora with dropout",
    "autocast",
    "in epochs",
    "a mixture with weights",
    "texts joined",
)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=() if name in QUICK else pytest.mark.thorough)
        for name, kind in KINDS.items()
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"text": " ".join(f"w{n % 7}" for n in range(length))} for length in range(2, 40)]
    Path("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    if kind:
        train("sft.yaml", "run.name=undisturbed", "--overwrite", *kind)
    train_until(5, "sft.yaml", *kind, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    if "data.eval_fraction=0" in kind:
        assert weights(RUN) == weights(UNDISTURBED)
    else:
        assert_same()


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's compiler uses what torch deprecates
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # it looks at its inputs
def test_a_compiled_run_learns_and_resumes_as_one_that_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = RunDirectory(Path("runs/compiled"))
    train("sft.yaml", "run.name=compiled", "model.compile=true")
    ours, plain = (read_metrics(run.metrics).steps for run in (compiled, UNDISTURBED))
    assert [step.step for step in ours] == [step.step for step in plain] != []
    for step, expected in zip(ours, plain, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    train_until(5, "sft.yaml", "model.compile=true", monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert weights(RUN) == weights(compiled)


@pytest.mark.parametrize("step", [2, 3, 6, STEPS])
def test_it_does_not_matter_in_which_step_a_run_died(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(step, "sft.yaml", monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert_same()


@pytest.mark.thorough
def test_a_run_whose_weights_are_decomposed_otherwise_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = ("model.method=lora", "model.lora.rank=4", "model.lora.init=pissa_niter_16")
    train_until(5, "sft.yaml", *kind, monkeypatch=monkeypatch)
    # Another seed stands for another processor.
    otherwise = partial(apply_lora, seed=1)
    monkeypatch.setattr(
        "fitune.model.load.apply_lora", lambda model, lora, **_: otherwise(model, lora)
    )
    assert "the saved tensors do not fit" in error_of(capsys, "--resume", "runs/run")


def test_a_run_may_die_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    train_until(3, "sft.yaml", monkeypatch=monkeypatch)
    for step in (4, 6, 9):
        train_until(step, "--resume", "runs/run", monkeypatch=monkeypatch)
    train("--resume", "latest", "--output", "runs")
    assert_same()
    resumed = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert resumed == [f"goes on after step {step}" for step in (2, 3, 4, 8)]


def test_a_run_that_finished_stays_as_it_is() -> None:
    train("sft.yaml")
    train("--resume", "runs/run")
    assert_same()


def test_a_run_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(5, 1, patched)
        train("sft.yaml", exit_code=130)
    train("--resume", "runs/run")
    assert_same()


def interrupt_at(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        for _ in range(times if metrics.step == step else 0):
            handler = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while (
                signal.getsignal(signal.SIGINT) is handler
            ):  # two that come before the first is handled are one
                time.sleep(0.001)

    monkeypatch.setattr(TrainingProgress, "step", interrupt)


def test_a_second_control_c_ends_at_once_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(5, 2, monkeypatch)
    train("sft.yaml", exit_code=130)
    assert read_run(RUN.path).state == "stopped"
    assert [event.message for event in read_events(RUN.events) if event.kind == "stopped"] == [
        "interrupted at once, without saving"
    ]
    assert newest_step() == 4


@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.parametrize(
    "every", [(), ("train.eval_every=1", "train.save_every=3")], ids=["some", "each"]
)
def test_an_evaluation_that_is_due_when_a_run_is_stopped_is_made_when_it_goes_on(
    step: int, every: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if every:
        train("sft.yaml", "run.name=undisturbed", "--overwrite", *every)
    with monkeypatch.context() as patched:
        interrupt_at(step, 1, patched)
        train("sft.yaml", *every, exit_code=130)
    train("--resume", "runs/run")
    assert_same()


def test_a_run_that_stops_after_each_step_has_the_evaluations_of_one_that_does_not() -> None:
    train("sft.yaml", "train.stop_after=0.001s")
    for _ in range(STEPS - 1):
        train("--resume", "runs/run")
    assert_same()


@pytest.mark.parametrize("call", [1, 3])
def test_an_evaluation_that_found_no_memory_is_made_when_the_run_goes_on(call: int) -> None:
    """The second evaluation of four, and the one after the last step."""
    with failing_call(
        "fitune.recovery.guard.Guard.evaluate", call, error=lambda: OutOfMemoryError("no memory")
    ):
        train("sft.yaml", exit_code=4)
    train("--resume", "runs/run")
    assert_same()


def test_weights_that_are_the_best_of_a_resumed_run_survive_a_death_right_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(3, 1, patched)
        train("sft.yaml", exit_code=130)
    train_until(4, "--resume", "runs/run", monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert_same()


def test_a_signal_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(5, 1, monkeypatch)
    assert "fitune train --resume runs/run goes on" in error_of(capsys, "sft.yaml", exit_code=130)


# --- what may change ---------------------------------------------------------------------------------------------


def test_a_run_goes_on_the_next_day_under_a_template_that_writes_the_date(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = "{{ strftime_now('w%d') }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    Path("dated.jinja").write_text(template)
    day = datetime.date(2026, 1, 1)
    monkeypatch.setattr("fitune.training.prepare.today", lambda: day)
    train_until(5, "sft.yaml", "data.template=dated.jinja", monkeypatch=monkeypatch)
    assert read_config(RUN.config).config.data.date == "2026-01-01"
    monkeypatch.setattr("fitune.training.prepare.today", lambda: day + datetime.timedelta(days=1))
    train("--resume", "runs/run")
    assert read_summary(RUN.summary).status == "finished"


def test_another_micro_batch_is_the_same_run_to_1e_5(crashed: None) -> None:
    train("--resume", "runs/run", "batch.micro=3")
    summary, expected = read_summary(RUN.summary), read_summary(UNDISTURBED.summary)
    assert summary.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
    assert [line["step"] for line in log(RUN)] == [line["step"] for line in log(UNDISTURBED)]
    notes = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert notes[1].startswith(
        "goes on to 1e-5, not bit for bit: batch.micro none -> 3; batch.micro_tokens "
    )


CHANGES = {
    "batch.effective": ("batch.effective=4", "batch.effective 8 -> 4"),
    "optim.lr": ("optim.lr=0.02", "optim.lr 0.01 -> 0.02"),
    "train.seed": ("train.seed=1", "train.seed 0 -> 1"),
    "train.steps": ("train.steps=20", "train.steps 9 -> 20"),
    "data.train": ("data.max_rows=50", "data.train "),
}


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_what_makes_another_run_is_refused_with_the_difference_until_it_is_declared(
    key: str, change: tuple[str, str], capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    before = {
        path: path.read_bytes()
        for path in RUN.path.rglob("*")
        if path.is_file() and path != RUN.lock
    }
    error = error_of(capsys, "--resume", "runs/run", change[0])
    assert f"--allow-change {key}" in error
    assert f"\n  {change[1]}" in error
    assert {path: path.read_bytes() for path in before} == before
    allowed = [f"--allow-change={name}" for name in CHANGES if f"--allow-change {name}" in error]
    more = ["--allow-change=data.eval"] if "--allow-change data.eval" in error else []
    train("--resume", "runs/run", change[0], *allowed, *more)
    assert read_run(RUN.path).state == "finished"
    assert any(change[1] in event.message for event in read_events(RUN.events))


def test_a_change_that_was_declared_and_did_not_happen_is_noticed(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    assert "has not changed" in error_of(capsys, "--resume", "runs/run", "--allow-change=optim.lr")


@pytest.mark.parametrize("change", ["optim.name=sgd", "model.method=lora", "model.source=other"])
def test_a_change_that_the_saved_tensors_cannot_follow_needs_a_new_run(
    change: str, capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    save_tiny_model(Path("other"), TINY_QWEN3)
    assert "start a new run with model.source" in error_of(capsys, "--resume", "runs/run", change)


def test_a_run_goes_on_elsewhere_with_its_data_and_model_under_other_names(
    disturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sft.yaml", "run.name=undisturbed", "--overwrite", "model.method=lora")
    train_until(5, "sft.yaml", "model.method=lora", monkeypatch=monkeypatch)
    shutil.copytree("tiny", "moved/model")
    shutil.move("sft.jsonl", "moved/rows.jsonl")
    (disturbed / "tiny").unlink()
    shutil.move("runs/run", "moved/run")
    train("--resume", "moved/run", "model.source=moved/model", "data.train=moved/rows.jsonl")
    assert_same(RunDirectory(Path("moved/run")))


def test_the_identity_names_no_path_device_or_version(disturbed: Path, crashed: None) -> None:
    found, _ = newest_checkpoint(RUN)
    assert found is not None
    text = json.dumps(found.identity)
    assert not [
        word
        for word in (str(disturbed), "tiny", "sft.jsonl", "cpu", torch.__version__)
        if word in text
    ]


def test_another_model_of_the_same_shape_is_another_run_under_adapters(
    disturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_until(5, "sft.yaml", "model.method=lora", monkeypatch=monkeypatch)
    shutil.copytree("tiny", "other")
    tensors = load_file("other/model.safetensors")
    save_file(
        {name: tensor + 0.01 for name, tensor in tensors.items()},
        "other/model.safetensors",
        {"format": "pt"},
    )
    assert "do not fit (model " in error_of(capsys, "--resume", "runs/run", "model.source=other")


# --- damage ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = [
    "model/model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
    "model/config.json",
]


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[Path], None], crashed: None
) -> None:
    path = RUN.checkpoints / "step-00000004" / name
    unlink_and_write(path)
    damage(path)
    found, faults = newest_checkpoint(RUN)
    assert found is not None
    assert found.state.step == 3
    assert len(faults) == 1
    assert "step-00000004 is damaged" in faults[0]


def unlink_and_write(path: Path) -> None:
    """Its links in last/ and best/ stay as they are."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def test_after_damage_the_result_is_the_same_and_the_damage_is_said(crashed: None) -> None:
    cut(RUN.checkpoints / "step-00000004" / "optimizer.safetensors")
    train("--resume", "runs/run")
    assert_same()
    notes = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert "optimizer.safetensors has" in notes[0]
    assert notes[1] == "goes on after step 3"


def test_a_run_without_any_whole_checkpoint_is_refused_and_left_alone(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    for path in RUN.checkpoints.iterdir():
        cut(path / "state.json")
    metrics = RUN.metrics.read_bytes()
    error = error_of(capsys, "--resume", "runs/run")
    assert "no checkpoint of runs/run is whole" in error
    assert error.count("is damaged") == 2
    assert RUN.metrics.read_bytes() == metrics


def test_a_log_that_has_lost_lines_is_said(crashed: None) -> None:
    lines = RUN.metrics.read_bytes().splitlines(keepends=True)
    RUN.metrics.write_bytes(b"".join(lines[:2]))
    train("--resume", "runs/run")
    notes = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert "metrics.jsonl has lost" in notes[-1]


def test_a_journal_that_was_changed_is_said(crashed: None) -> None:
    flip(RUN.journal)
    train("--resume", "runs/run")
    notes = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert "journal.jsonl" in notes[-1]


# --- the directory -----------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_and_the_best_one_are_kept() -> None:
    train(
        "sft.yaml", "optim.lr=1.0", "optim.warmup=0.9", "train.save_every=1", "train.eval_every=1"
    )
    summary, evals = read_summary(RUN.summary), read_metrics(RUN.metrics).evals
    best = next(line.step for line in evals if line.eval_loss == summary.best_eval_loss)
    assert best < STEPS - 2
    assert sorted(path.name for path in RUN.checkpoints.iterdir()) == [
        f"step-{step:08d}" for step in (best, STEPS - 1, STEPS)
    ]


def test_large_weights_in_last_and_best_are_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.model.save.LINKED_BYTES", 4096)
    train("sft.yaml")
    inodes = {(directory / "model.safetensors").stat().st_ino for directory in (RUN.last, RUN.best)}
    assert inodes == {(RUN.checkpoints / f"step-{STEPS:08d}/model/model.safetensors").stat().st_ino}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_small_file_in_last_may_be_edited_without_harm_to_the_checkpoint(name: str) -> None:
    train("sft.yaml")
    for directory in (RUN.last, RUN.best):
        with (directory / name).open("ab") as file:
            file.write(b" ")
    found, faults = newest_checkpoint(RUN)
    assert found is not None
    assert (found.state.step, faults) == (STEPS, [])


def test_a_tokenizer_with_several_chat_templates_is_saved_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Path("several")
    shutil.copytree("tiny", place)
    templates = place / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    several = ("sft.yaml", "model.source=several")
    train(*several, "run.name=undisturbed", "--overwrite")
    train_until(5, *several, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert_same()
    assert [event.kind for event in read_events(RUN.events)] == ["resume"]
    for saved in (RUN.last, RUN.best):
        assert AutoTokenizer.from_pretrained(saved).chat_template.keys() == {"default", "tool_use"}
    assert len(list(RUN.checkpoints.iterdir())) <= NUM_KEPT + 1
    assert cli_main(["export", str(RUN.path), "--to", "hf", "-o", "exported"]) == 0
    assert (Path("exported") / templates.name / "tool_use.jinja").exists()


def test_weights_have_the_mode_of_other_files() -> None:
    train("sft.yaml")
    assert (RUN.last / "model.safetensors").stat().st_mode == RUN.metrics.stat().st_mode


def test_adapters_are_saved_without_the_model_below_them() -> None:
    train("sft.yaml", "model.method=lora")
    saved = load_file(RUN.checkpoints / f"step-{STEPS:08d}" / "weights.safetensors")
    assert all(".lora_" in name for name in saved)


def test_a_run_at_work_is_not_resumed_by_a_second_process(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    with working_on(RUN):
        assert "is being worked on" in error_of(capsys, "--resume", "runs/run")


def test_a_run_that_died_before_its_first_save_starts_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_until(1, "sft.yaml", monkeypatch=monkeypatch)
    assert newest_checkpoint(RUN) == (None, [])
    train("--resume", "runs/run")
    assert_same()


def test_a_run_that_died_before_it_began_is_started_again_as_it_was() -> None:
    create_run(Path("runs"), "run")
    train("--resume", "runs/run", exit_code=2)
    train("sft.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume", "latest"), "there are no runs in runs"),
        (("--resume", "tiny"), "is not the directory of a run"),
        (("--resume", "a", "--replay", "b"), "exclude each other"),
        (("--resume", "a", "--overwrite"), "begins a run anew"),
        (("sft.yaml", "--allow-change=optim.lr"), "--allow-change is for --resume"),
    ],
)
def test_what_cannot_be_resumed_is_said(
    arguments: tuple[str, ...], message: str, disturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs")
    Path("runs").mkdir()
    assert message in error_of(capsys, *arguments)


def test_a_run_has_its_configuration_already(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    assert "the run has its configuration" in error_of(capsys, "sft.yaml", "--resume", "runs/run")
    assert "run.name has no effect" in error_of(capsys, "--resume", "runs/run", "run.name=other")


# --- saving beside the step --------------------------------------------------------------------------------------


def test_the_update_waits_until_the_tensors_are_read(monkeypatch: pytest.MonkeyPatch) -> None:

    def slowly(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
        time.sleep(0.05)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_content, "write_tensors", slowly)
    train("sft.yaml")
    assert_same()
    hashes = {
        run: (run.checkpoints / "step-00000008/manifest.json").read_text()
        for run in (RUN, UNDISTURBED)
    }
    files = {run: json.loads(text)["files"] for run, text in hashes.items()}
    assert all(
        files[RUN][name] == files[UNDISTURBED][name]
        for name in files[RUN]
        if name.endswith(".safetensors")
    )


def test_a_save_that_fails_is_said_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at({4}, monkeypatch)
    train("sft.yaml")
    assert weights(RUN) == weights(UNDISTURBED)
    failed = [event.message for event in read_events(RUN.events) if event.kind == "save_failed"]
    assert failed == [
        "warning: step 4 could not be saved: No space left on device; the run goes on"
    ]
    assert not list(RUN.checkpoints.glob(".*"))


def fail_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
        if any(f"step-{step:08d}" in str(path) for step in steps):
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_content, "write_tensors", fail)


def test_a_last_save_that_fails_ends_the_run_with_what_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        fail_at({STEPS}, patched)
        error = error_of(capsys, "sft.yaml")
    assert f"step {STEPS} could not be saved" in error
    assert "the checkpoint before it is whole" in error
    assert newest_step() == 8
    train("--resume", "runs/run")
    assert_same()


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    disturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of this model has 0.2 MiB; the disk has room for some of them until another file takes it."""
    disk = disturbed / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    run = RunDirectory(disk / "run")
    try:

        def fill(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
            if metrics.step == 5:
                (disk / "filler").write_bytes(bytes(3 * 2**20))

        with monkeypatch.context() as patched:
            patched.setattr(TrainingProgress, "step", fill)
            error = error_of(capsys, "sft.yaml", f"run.output={disk}")
        assert "has no space for" in error
        found, faults = newest_checkpoint(run)
        assert found is not None
        assert (found.state.step, faults) == (4, [])
        (disk / "filler").unlink()
        train("--resume", str(run.path))
        assert_same(run)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_becomes_read_only_ends_the_run_in_one_sentence(
    disturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (disturbed / "empty").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs"]
    if (
        subprocess.run([*command, disturbed / "empty"], capture_output=True, check=False).returncode
        != 0
    ):
        pytest.skip("mounting a disk is not allowed here")
    subprocess.run(["umount", disturbed / "empty"], check=True)

    def protect(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == 5:
            subprocess.run([*command, RUN.checkpoints], check=True)

    monkeypatch.setattr(TrainingProgress, "step", protect)
    try:
        error = error_of(capsys, "sft.yaml")
    finally:
        subprocess.run(["umount", RUN.checkpoints], check=True)
    assert "Read-only file system" in error
    assert newest_step() in (3, 4)  # that of step 4 may have been on its way


# --- replay ------------------------------------------------------------------------------------------------------


def test_a_replay_does_the_same_steps_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    train("sft.yaml", "batch.micro=3")
    train("--replay", "runs/run")
    assert "9 steps, each bit for bit" in capsys.readouterr().err
    again = RunDirectory(Path("runs/run-replay-0001"))
    assert weights(again) == weights(RUN)
    assert read_journal(again.journal)[-1].hash == read_journal(RUN.journal)[-1].hash


def rewrite_journal(change: Callable[[StepRecord], StepRecord]) -> None:
    """With a chain that is right."""
    lines = read_journal(RUN.journal)
    RUN.journal.unlink()
    link = CHAIN_START
    for line in lines:
        values = {name: getattr(line, name) for name in StepRecord.__dataclass_fields__}
        link = append_step(RUN.journal, link, change(StepRecord(**values)), seconds=line.seconds)


def test_a_replay_takes_the_splits_of_the_journal() -> None:
    train("sft.yaml", "optim.lr=1e-9", "batch.micro=3")
    lines = read_journal(RUN.journal)
    config = RUN.config.read_text()
    RUN.config.write_text(config.replace("micro: 3", "micro: 2"))
    train("--replay", "runs/run")
    assert [line.plan for line in read_journal(Path("runs/run-replay-0001/journal.jsonl"))] == [
        line.plan for line in lines
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_sum", 1.0), ("grad_norm", 1.0), ("lr", 1e-9), ("plan", ((1, 2), (3,)))],
)
def test_a_replay_that_differs_says_where(
    name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train("sft.yaml")
    rewrite_journal(lambda record: replace(record, **{name: value}) if record.step == 5 else record)
    error = error_of(capsys, "--replay", "runs/run", exit_code=1)
    assert "the replay differs from runs/run at step 5" in error
    assert f"  {name} " in error


def test_a_journal_that_was_tampered_with_is_not_replayed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train("sft.yaml")
    RUN.journal.write_text(
        RUN.journal.read_text().replace('"updated": true', '"updated": false', 1)
    )
    assert "does not follow from the line before it" in error_of(capsys, "--replay", "runs/run")


# --- the pieces --------------------------------------------------------------------------------------------------


def test_a_state_reads_back_as_it_was() -> None:
    peak = MemoryPeak(device_bytes=5)
    state = RunState(
        step=3,
        train_loss=math.inf,
        eval_loss=0.1 + 0.2,
        peak=peak,
        seconds=1.5,
        eval_losses=(1.0, -math.inf),
    )
    content = json.loads(json.dumps(checkpoint_content.state_json(state), allow_nan=False))
    assert checkpoint_content.read_state(content) == state


def test_random_numbers_go_on_where_they_were() -> None:
    device = torch.device("cpu")
    checkpoint_content.seed_everything(3)
    saved = json.loads(json.dumps(checkpoint_content.random_state(device)))
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    checkpoint_content.set_random_state(saved, device)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn


def test_what_a_killed_process_had_half_written_is_removed() -> None:
    train("sft.yaml", "train.steps=4")
    left = RUN.path / ".summary.json.4711"
    left.write_text("{")
    train("--resume", "runs/run")
    assert not left.exists()
