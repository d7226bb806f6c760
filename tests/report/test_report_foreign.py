"""What other trainers leave is read: real files of the libraries that are here, and lines as the others write them."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fitune.errors import RunDirectoryError
from fitune.report.compare import compare
from fitune.report.run_on_disk import RecordedRun
from fitune.report.sources import read_recorded
from written_runs import Recipe, write_run

MINIMIND = """\
Epoch:[1/2](0/1000), loss: 2.7312, logits_loss: 2.7312, aux_loss: 0.0000, lr: 0.00005000, epoch_time: 31.0min
some other line
Epoch:[1/2](100/1000), loss: 2.5121, logits_loss: 2.5121, aux_loss: 0.0000, lr: 0.00004990, epoch_time: 30.0min
Epoch:[2/2](100/1000), loss: nan, logits_loss: nan, aux_loss: 0.0000, lr: 1.2e-06, epoch_time: 3.0min
"""
MINIMIND_BEFORE = "Epoch:[1/6](100/24681) loss:7.512 lr:0.000498751275 epoch_Time:40.0min:\n"
RUNS = Path(__file__).parents[1] / "foreign" / "runs"
PRINTED = """\
  Num examples = 1,000
  Num Epochs = 1
  Total train batch size (w. parallel, distributed & accumulation) = 8
  Total optimization steps = 50
{'loss': 2.9, 'grad_norm': 1.2, 'learning_rate': 5e-05, 'num_tokens': 512.0, 'epoch': 0.16}
{'loss': nan, 'grad_norm': nan, 'learning_rate': 5e-05, 'num_tokens': 1024.0, 'epoch': 0.32}
{'train_runtime': 3.1, 'train_loss': 2.9, 'epoch': 0.32}
"""
LLAMA_FACTORY = [
    {"current_steps": 5, "total_steps": 10, "loss": 2.5, "lr": 5e-5, "epoch": 0.5, "percentage": 50.0,
     "elapsed_time": "0:00:12", "remaining_time": "0:00:12", "throughput": 1234.5, "total_tokens": 14814,
     "vram_allocated": 10.5, "vram_reserved": 12.0},
    {"current_steps": 10, "total_steps": 10, "loss": 2.25, "lr": 1e-6, "epoch": 1.0, "percentage": 100.0,
     "elapsed_time": "1 day, 0:00:24", "remaining_time": "0:00:00", "throughput": 1240.0, "total_tokens": 29760},
    {"current_steps": 10, "total_steps": 10, "eval_loss": 2.3, "epoch": 1.0, "percentage": 100.0},
    {"current_steps": 10, "total_steps": 10, "epoch": 1.0, "percentage": 100.0, "elapsed_time": "0:00:24"},
]  # fmt: skip


def read_one(path: Path) -> RecordedRun:
    (run,) = read_recorded(path)
    return run


def test_minimind_prints_its_losses_by_micro_batch(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(MINIMIND)
    run = read_one(log)
    assert run.origin == "minimind"
    assert list(run.train["step"]) == [0, 100, 1100]
    assert list(run.train["loss"])[:2] == [2.7312, 2.5121]
    assert math.isnan(run.train["loss"][2])
    assert list(run.train["lr"]) == [5e-5, 4.99e-5, 1.2e-6]
    assert "micro-batch" in run.notes[0]
    log.write_text(MINIMIND_BEFORE)
    run = read_one(log)
    assert (run.train["loss"][0], run.train["lr"][0]) == (7.512, 0.000498751275)


def test_llama_factory_logs_steps_evaluations_and_memory(tmp_path: Path) -> None:
    (tmp_path / "lf").mkdir()
    (tmp_path / "lf" / "trainer_log.jsonl").write_text(
        "\n".join(map(json.dumps, LLAMA_FACTORY)) + '\n{"current'
    )
    run = read_one(tmp_path / "lf")
    assert (run.name, run.origin) == ("lf", "llama-factory")
    assert list(run.train["loss"]) == [2.5, 2.25]
    assert list(run.train["seconds"]) == [12.0, 86424.0]
    assert run.train["peak_reserved_bytes"][0] == 12 * 2**30
    assert (run.evals["eval_loss"][0], run.evals["total_tokens"][0]) == (2.3, 29760)


def test_it_stands_beside_a_run_of_ours_at_equal_tokens(tmp_path: Path) -> None:
    (tmp_path / "lf").mkdir()
    (tmp_path / "lf" / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, LLAMA_FACTORY)))
    found = compare([write_run(tmp_path, "ours", Recipe()), tmp_path / "lf"])
    assert found.tokens == 29760
    assert found.rows[1].eval_loss == 2.3
    assert found.rows[1].tokens_per_second is not None
    assert found.rows[1].eval_difference is None


def test_a_log_without_tokens_is_taken_at_its_end_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(MINIMIND.replace("nan", "2.1"))
    found = compare([write_run(tmp_path, "ours", Recipe()), tmp_path / "train.log"])
    assert found.rows[1].train_loss == pytest.approx(2.1)
    assert "no comparison at equal tokens" in " ".join(found.notes)


def test_zero_tokens_are_not_counted() -> None:
    run = read_one(RUNS / "zero")
    assert list(run.train["loss"])[:2] == [2.4, 2.3]
    assert all(
        math.isnan(value)
        for name in ("total_tokens", "tokens_per_second")
        for value in run.train[name]
    )
    found = compare([RUNS / "zero", RUNS / "mm" / "now.log"])
    assert found.tokens is None
    assert found.rows[0].train_loss == pytest.approx(1.6)
    assert "zero, mm: tokens were not counted" in " ".join(found.notes)


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_that_diverged_never_wins_and_is_told(order: int) -> None:
    found = compare([RUNS / "nan", RUNS / "mm" / "now.log"][::order])
    rows = {row.name: row for row in found.rows}
    assert (rows["nan"].train_loss, rows["nan"].on_front, rows["mm"].on_front) == (
        None,
        False,
        True,
    )
    assert "nan diverged: from step 6 on its loss is not a number" in " ".join(found.notes)


def test_a_run_that_does_not_count_tokens_leaves_the_place_of_the_others(tmp_path: Path) -> None:
    ours = write_run(tmp_path, "ours", Recipe())
    places = {compare(runs).tokens for runs in ([ours, RUNS / "zero"], [RUNS / "zero", ours])}
    assert len(places) == 1
    assert places != {None}


def test_what_transformers_prints_is_read() -> None:
    run = read_one(RUNS / "hfprint" / "nohup.out")
    assert (run.name, run.origin) == ("hfprint", "transformers")
    assert list(run.train["step"]) == list(range(10, 101, 10))
    assert (run.train["loss"][0], run.train["loss"][-1], run.train["lr"][0]) == (2.9, 2.0, 5e-5)
    assert (run.evals["step"][0], run.evals["eval_loss"][0]) == (100, 2.1)


def test_steps_that_transformers_prints_as_epochs_are_of_the_rows_and_the_batch(
    tmp_path: Path,
) -> None:
    (tmp_path / "out.txt").write_text(PRINTED)
    run = read_one(tmp_path / "out.txt")
    assert list(run.train["step"]) == [20, 40]
    assert list(run.train["total_tokens"]) == [512, 1024]
    assert math.isnan(run.train["loss"][1])


def test_printed_lines_without_a_beginning_are_counted_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("\n".join(PRINTED.splitlines()[4:]))
    run = read_one(tmp_path / "out.txt")
    assert list(run.train["step"]) == [1, 2]
    assert "each line counts as one" in run.notes[0]


def test_what_a_restart_logged_again_takes_the_place_of_what_stood_there() -> None:
    run = read_one(RUNS / "restart")
    assert list(run.train["step"])[:3] == [10, 20, 30]
    assert run.train["loss"][0] == 1.95
    assert "logged again from step 10 on" in run.notes[0]


def test_a_restart_that_has_not_come_as_far_leaves_nothing_of_the_first_behind(
    tmp_path: Path,
) -> None:
    steps = [(10, 3.0), (20, 2.5), (30, 2.0), (20, 2.4)]
    lines = [json.dumps({"current_steps": step, "loss": loss}) for step, loss in steps]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(lines))
    assert list(read_one(tmp_path).train["loss"]) == [3.0, 2.4]


def test_checkpoints_are_ordered_by_step_and_not_by_the_time_of_the_file(tmp_path: Path) -> None:
    for step, age in ((10, 0), (9, 100), (100, 50)):
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        path.parent.mkdir()
        path.write_text(
            json.dumps({"global_step": step, "log_history": [{"step": step, "loss": 1.0}]})
        )
        os.utime(path, (age, age))
    assert list(read_one(tmp_path).train["step"]) == [100]


@pytest.mark.parametrize(("log", "loss"), [("agent.log", 0.95), ("now.log", 2.9), ("old.log", 2.9)])
def test_all_spellings_of_minimind_are_read(log: str, loss: float) -> None:
    run = read_one(RUNS / "mm" / log)
    assert (run.train["loss"][0], len(run.train["lr"])) == (loss, 10)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trainer_state.json", "{}"),
        ("trainer_state.json", "{"),
        ("trainer_log.jsonl", "{}\n"),
        ("a.log", "nothing"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDirectoryError):
        read_recorded(tmp_path / name)


def train_with_transformers(tmp_path: Path, **options: Any) -> Any:
    """Four steps of the real Trainer on a tiny model."""
    from transformers import Trainer, TrainingArguments

    from fitune.model.load import build_model
    from tiny_models import TINY_LLAMA

    rows = [{"input_ids": [5, 6, 7, 8 + n % 4], "labels": [5, 6, 7, 8 + n % 4]} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), per_device_train_batch_size=2, logging_steps=1, eval_strategy="epoch",
        save_strategy="epoch", num_train_epochs=1, learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = Trainer(
        build_model(TINY_LLAMA, seed=1), arguments, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_real_run_of_transformers_is_read(tmp_path: Path) -> None:
    trainer = train_with_transformers(
        tmp_path, report_to="none", include_num_input_tokens_seen="all"
    )
    run = read_one(tmp_path / "hf")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (run.name, run.origin) == ("hf", "transformers")
    assert list(run.train["loss"]) == [entry["loss"] for entry in logged]
    assert list(run.train["total_tokens"]) == [8, 16, 24, 32]
    assert run.evals["eval_loss"][0] == pytest.approx(
        next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    )
    assert run.settings == {"batch.micro": 2}


@pytest.mark.filterwarnings("ignore")
def test_a_real_record_of_tensorboard_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = train_with_transformers(tmp_path, report_to="tensorboard")
    (file,) = tmp_path.rglob("*tfevents*")
    run = read_one(file.parent)
    assert run.origin == "tensorboard"
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert list(run.train["loss"]) == pytest.approx(expected, abs=1e-4)
    assert len(run.evals["eval_loss"]) == 1
    assert list(run.train["lr"]) == pytest.approx(
        [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    )


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_a_real_run_of_trl_is_read(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tiny_run import dialogues, save_tiny_model

    save_tiny_model(tmp_path / "tiny")
    rows = Dataset.from_list([{"messages": messages} for messages in dialogues(16)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_length=32, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, num_train_epochs=1, eval_strategy="epoch", save_strategy="epoch",
        bf16=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        str(tmp_path / "tiny"),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    run = read_one(tmp_path / "trl")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert list(run.train["loss"]) == [entry["loss"] for entry in logged]
    assert list(run.train["total_tokens"]) == [entry["num_tokens"] for entry in logged]
    assert len(run.evals["eval_loss"]) == 1


def test_lines_that_ms_swift_logs_are_read(tmp_path: Path) -> None:
    lines = [
        {
            "loss": 2.5,
            "learning_rate": 1e-4,
            "global_step/max_steps": f"{step}/20",
            "memory(GiB)": 20.5,
        }
        for step in (1, 6)
    ]
    lines.append({"eval_loss": 1.9, "global_step/max_steps": "6/20"})
    lines.append({"train_runtime": 100, "train_loss": 1.2, "global_step": 20})
    (tmp_path / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_one(tmp_path)
    assert run.origin == "ms-swift"
    assert (list(run.train["step"]), list(run.evals["eval_loss"])) == ([1, 6], [1.9])


@pytest.mark.parametrize(
    "names", [("step", "loss"), ("global_step", "train/loss"), ("_step", "loss")]
)
def test_lines_with_a_step_and_a_loss_are_read(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({names[0]: i, names[1]: 3 - i}) + "\n" for i in (1, 2))
    )
    assert list(read_one(tmp_path / "a.jsonl").train["loss"]) == [2, 1]


@pytest.mark.parametrize("column", ["train/loss", "loss", "my run - train/loss"])
def test_what_wandb_exports_is_read(column: str, tmp_path: Path) -> None:
    more = f',"{column}__MIN"'
    (tmp_path / "a.csv").write_text(f'"Step","{column}"{more}\n1,2.5,0\n2,2.0,0\n')
    run = read_one(tmp_path / "a.csv")
    assert (list(run.train["step"]), list(run.train["loss"])) == ([1, 2], [2.5, 2.0])


def test_a_chart_of_several_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"Step","a - train/loss","b - train/loss"\n1,2.5,2\n')
    with pytest.raises(RunDirectoryError, match="holds several runs"):
        read_one(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "line",
    [
        "{'grad_norm': 1.2, 'loss': 2.5, 'learning_rate': 2e-05, 'epoch': 0.1}",
        '{"loss": 2.5, "epoch": 0.1}',
        "10%|x| 1/10 [00:01<00:09]{'loss': '2.5', 'epoch': '0.1'}",
    ],
)
def test_printed_lines_are_read_in_any_order_and_quotes(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(f"{line}\n")
    assert list(read_one(tmp_path / "a.log").train["loss"]) == [2.5]


def test_a_loss_of_0_without_a_gradient_is_a_diverged_run(tmp_path: Path) -> None:
    """transformers writes 0 where the loss is no number, and nan for the norm."""
    history = [
        {"loss": 2.0, "grad_norm": 1.0, "step": 1},
        {"loss": 0.0, "grad_norm": math.nan, "step": 2},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert math.isnan(read_one(tmp_path).train["loss"][-1])
