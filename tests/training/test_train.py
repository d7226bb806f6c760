"""`fitune train` and `fitune export` as a person runs them: what a run leaves behind, and that it is right."""

import copy
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fitune
from disturbed_run import predict_nothing, train_until
from fitune import errors
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.config import ModelConfig, read_config
from fitune.data.examples import load_examples
from fitune.model.finite import saved_not_finite
from fitune.model.load import build_model, load_model
from fitune.run.directory import RunDirectory, read_run
from fitune.run.metrics import (
    StepMetrics,
    Summary,
    read_events,
    read_metrics,
    read_summary,
    summary_json,
)
from tiny_models import TINY_QWEN3
from tiny_run import save_tiny_model, write_config, write_dialogues

SOURCE = Path(__file__).parents[2] / "src"
RUN = RunDirectory(Path("runs/run"))
STEP_KEYS = [
    "step", "tokens", "supervised_tokens", "total_tokens", "loss", "lr", "grad_norm", "seconds", "tokens_per_second",
    "num_micro_batches", "device_used_bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny_run")
    save_tiny_model(directory / "tiny")
    return directory


@pytest.fixture
def planned() -> None:
    """Runs plan and predict their memory, which takes most of the time of so small a run; elsewhere they do not."""


@pytest.fixture(autouse=True)
def place(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Path:
    """A directory with tiny/, sft.jsonl and sft.yaml, which is the current one."""
    if "planned" not in request.fixturenames:
        predict_nothing(monkeypatch)
    monkeypatch.setenv("FITUNE_CACHE", str(shared / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    write_config(tmp_path / "sft.yaml")
    return tmp_path


def train(*arguments: str) -> Summary:
    """Three steps unless the arguments say how many; the summary of the run that they name."""
    length = (
        []
        if any(argument.startswith("train.steps=") for argument in arguments)
        else ["train.steps=3"]
    )
    assert main(["train", "sft.yaml", *length, *arguments]) == 0
    names = [
        argument.removeprefix("run.name=")
        for argument in arguments
        if argument.startswith("run.name=")
    ]
    return read_summary(Path("runs", *(names or ["run"]), "summary.json"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 2) -> str:
    """The one error that this command ends with."""
    capsys.readouterr()
    assert main(arguments) == exit_code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def plain_eval_loss(directory: Path) -> float:
    """The held-out loss by plain transformers, row by row: no packing, no chunks, nothing of the training step."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory).eval()
    examples = load_examples(
        read_config(RUN.config).config.data, AutoTokenizer.from_pretrained(directory), split="eval"
    )
    loss, weight = 0.0, 0.0
    for row in examples:
        ids, loss_weights = torch.tensor(row.input_ids).long(), torch.tensor(row.loss_weights)
        with torch.no_grad():
            logits = model(ids.unsqueeze(0)).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
        loss += float(losses @ loss_weights[1:].double())
        weight += float(loss_weights[1:].sum())
    return loss / weight


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.epochs=0.001",
            "train.epochs 0.001 of 60 samples an epoch is not one sample: set it to 0.02 or more",
        ),
        (
            "data.train=[{path: sft.jsonl, weight: 0.001}]",
            "of 0.06 samples an epoch is not one sample: set it to 16.67 or more",
        ),
    ],
)
def test_a_run_without_a_sample_is_refused(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(capsys, "train", "sft.yaml", "data.eval_fraction=0", override)
    assert not RUN.path.exists()


def test_a_source_too_small_for_the_run_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialogues(place / "few.jsonl", 20, seed=5)
    sources = "data.train=[{path: sft.jsonl}, {path: few.jsonl, weight: 0.004}]"
    assert main(["train", "sft.yaml", "--dry-run", sources, "data.eval_fraction=0"]) == 0
    said = "warning: none of the 20 samples with weight 0.004 is seen in 1 epochs: at weight 0.025 one would be"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("planned")
def test_a_run_leaves_these_files() -> None:
    train()
    assert {path.name for path in RUN.path.iterdir()} == {
        "config.yaml", "env.json", "plan.json", "peak.json", "data.json", "metrics.jsonl", "eval_rows.jsonl",
        "memory.jsonl", "events.jsonl", "journal.jsonl", "summary.json",
        "checkpoints", "best", "last", "lock",
    }  # fmt: skip
    assert read_run(RUN.path).state == "finished"


def test_the_summary_has_exactly_these_keys() -> None:
    train()
    assert list(json.loads(RUN.summary.read_text())) == list(summary_json(Summary()))


def test_the_summary_agrees_with_the_lines() -> None:
    summary = train()
    metrics = read_metrics(RUN.metrics)
    assert metrics.damaged_lines == ()
    assert summary.steps == len(metrics.steps) == 3
    assert (
        summary.tokens
        == sum(step.tokens for step in metrics.steps)
        == metrics.steps[-1].total_tokens
    )
    assert summary.supervised_tokens == sum(step.supervised_tokens for step in metrics.steps)
    assert summary.train_loss == metrics.steps[-1].loss
    assert summary.eval_loss == metrics.evals[-1].eval_loss
    assert summary.best_eval_loss == min(line.eval_loss for line in metrics.evals[1:])


@pytest.mark.parametrize(
    ("length", "known"),
    [
        (("train.steps=3",), True),
        (("train.steps=null", "train.epochs=1"), True),
        (("train.steps=null", "train.tokens=300"), False),
    ],
)
def test_the_summary_tells_how_many_steps_there_will_be_where_that_is_known(
    length: tuple[str, ...], known: bool
) -> None:
    summary = train(*length)
    assert summary.total_steps == (summary.steps if known else None)


def test_each_step_has_a_line_with_these_keys() -> None:
    train()
    lines = [json.loads(line) for line in RUN.metrics.read_text().splitlines()]
    steps = [line for line in lines if "eval_loss" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line[key] is not None for line in steps for key in STEP_KEYS)


def test_evaluations_come_before_the_first_step_every_so_often_and_at_the_end() -> None:
    train("train.eval_every=2")
    assert [line.step for line in read_metrics(RUN.metrics).evals] == [0, 2, 3]


def test_the_model_learns() -> None:
    train("train.steps=20", "train.eval_every=20")
    before, after = read_metrics(RUN.metrics).evals
    assert after.eval_loss < before.eval_loss - 0.5


@pytest.mark.usefixtures("planned")
def test_the_saved_configuration_reads_back_as_the_one_that_was_given() -> None:
    train("optim.clip=0.5")
    saved = read_config(RUN.config).config
    assert saved == read_config(Path("sft.yaml"), ["train.steps=3", "optim.clip=0.5"]).config
    assert "# command line" in RUN.config.read_text()


@pytest.mark.usefixtures("planned")
def test_a_run_can_be_trained_again_from_its_own_configuration() -> None:
    train()
    assert main(["train", str(RUN.config), "run.name=again"]) == 0
    assert weights(Path("runs/again/last")) == weights(RUN.last)


def test_a_run_ends_after_evaluations_without_a_better_loss_and_resumes_with_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("optim.lr=1e-15", "train.eval_every=2", "eval.patience=2", "train.steps=40")
    assert train(*words).steps == 6  # the first evaluation is the best, and no other is better
    events = [event.kind for event in read_events(RUN.events)]
    assert "early_stop" in events
    train_until(
        5, "sft.yaml", *words, "train.save_every=1", "run.name=again", monkeypatch=monkeypatch
    )
    assert main(["train", "--resume", "runs/again"]) == 0
    assert read_summary(Path("runs/again/summary.json")).steps == 6


def test_the_example_of_pre_training_trains_from_nothing_on_texts_of_any_length(
    place: Path,
) -> None:
    example = Path(__file__).parents[2] / "examples" / "minimind" / "pretrain.yaml"
    texts = [f"<|im_start|> {'w1 w2 w3 ' * number} <|im_end|>" for number in range(1, 40)]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    words = [
        *("train", str(example), "model.source=tiny", "model.init=random", "model.tokenizer=tiny"),
        *("data.train=texts.jsonl", "data.max_length=32", "data.eval_fraction=0.2"),
        *("batch.effective=16", "optim.lr=0.02", "train.epochs=3", "run.name=pretrain"),
    ]
    assert main(words) == 0
    summary = read_summary(Path("runs/pretrain/summary.json"))
    report = json.loads((place / "runs/pretrain/data.json").read_text())
    assert report["ends"] == ["<|im_end|>"]
    assert report["train"]["num_rows"] > report["num_rows"]  # long texts became several samples
    assert summary.eval_loss is not None
    assert summary.eval_loss < 1.5  # three words in turn; at random ln(53) = 4


def test_the_machine_is_recorded() -> None:
    train()
    assert json.loads(RUN.env.read_text())["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [(), ("model.method=lora",)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "extra", [(), ("data.packing=false", "loss=full")], ids=["packed", "padded"]
)
def test_the_reported_loss_is_that_of_plain_transformers(
    arguments: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    summary = train(*arguments, *extra)
    directory = RUN.last
    if arguments:
        assert (
            main(["export", str(RUN.path), "--to", "hf", "--weights", "last", "-o", "merged"]) == 0
        )
        directory = Path("merged")
    assert plain_eval_loss(directory) == pytest.approx(summary.eval_loss, abs=1e-5)


def test_the_best_weights_are_those_of_the_best_evaluation() -> None:
    summary = train("optim.lr=1.0", "optim.warmup=0.9", "train.steps=8", "train.eval_every=1")
    assert summary.best_eval_loss is not None
    assert summary.eval_loss is not None
    assert summary.best_eval_loss < summary.eval_loss - 0.1
    assert plain_eval_loss(RUN.best) == pytest.approx(summary.best_eval_loss, abs=1e-5)
    assert plain_eval_loss(RUN.last) == pytest.approx(summary.eval_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (["train.steps=9"], 9),  # beyond one epoch of 56 rows in steps of 8
        (["train.steps=null", "train.epochs=2"], 14),
        (["train.steps=null", "train.epochs=0.5"], 4),  # 28 rows
        (["train.steps=null"], 7),
    ],
    ids=["steps", "epochs", "half an epoch", "one epoch by default"],
)
def test_a_run_is_as_long_as_configured(length: list[str], steps: int) -> None:
    assert train(*length).steps == steps


def test_a_run_of_tokens_ends_with_the_step_that_reaches_them() -> None:
    assert main(["train", "sft.yaml", "train.tokens=300"]) == 0
    metrics = read_metrics(RUN.metrics)
    assert metrics.steps[-1].total_tokens >= 300 > metrics.steps[-2].total_tokens


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    train()
    for name, seed in (("same", 0), ("other", 1)):
        train(f"run.name={name}", f"train.seed={seed}")
    assert weights(Path("runs/same/last")) == weights(RUN.last) != weights(Path("runs/other/last"))


def test_the_micro_batch_does_not_change_the_result() -> None:
    summary = train()
    split = train("run.name=split", "batch.micro=3")
    assert {
        step.num_micro_batches for step in read_metrics(Path("runs/split/metrics.jsonl")).steps
    } == {3}
    assert split.train_loss == pytest.approx(summary.train_loss, rel=1e-5)


def test_a_batch_twice_as_large_has_the_same_schedule_in_tokens() -> None:
    """A rate that falls in a straight line: each large step has the mean rate of the small ones that it stands for."""
    spent = {}
    for rows in (4, 8):
        straight = (
            "optim.schedule=linear",
            "optim.warmup=0",
            "train.epochs=1",
            f"batch.effective={rows}",
        )
        assert main(["train", "sft.yaml", f"run.name={rows}", *straight]) == 0
        steps = read_metrics(Path(f"runs/{rows}/metrics.jsonl")).steps
        rates = itertools.accumulate(step.lr * step.tokens for step in steps)
        spent[rows] = dict(zip((step.total_tokens for step in steps), rates, strict=True))
    assert len(spent[4]) == 2 * len(spent[8]) > 4
    assert {tokens: spent[4][tokens] for tokens in spent[8]} == pytest.approx(spent[8])


def test_lora_saves_adapters_only() -> None:
    train("model.method=lora")
    assert (RUN.last / "adapter_model.safetensors").is_file()
    assert not (RUN.last / "model.safetensors").exists()


def test_merged_adapters_keep_the_tokenizer_and_its_template() -> None:
    train("model.method=lora")
    assert main(["export", str(RUN.path), "--to", "hf"]) == 0
    merged = AutoTokenizer.from_pretrained(RUN.path / "export-hf")
    assert merged.chat_template == AutoTokenizer.from_pretrained("tiny").chat_template


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_exported_model_stops_at_the_end_that_its_template_has_taught_it(
    method: str, tmp_path: Path
) -> None:
    template = tmp_path / "ends.jinja"
    template.write_text(
        "{% for m in messages %}<|im_end|>{{ m.role }} {{ m.content }}<|im_start|>{% endfor %}"
    )
    train(f"model.method={method}", f"data.template={template}")
    assert main(["export", str(RUN.path), "--to", "hf"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    ends = AutoModelForCausalLM.from_pretrained(
        RUN.path / "export-hf"
    ).generation_config.eos_token_id
    assert tokenizer.bos_token_id in ends


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_exact_export_to_minimind_loads_back_bit_for_bit(method: str) -> None:
    train(f"model.method={method}")
    assert main(["export", str(RUN.path), "--to", "minimind", "--exact", "-o", "out/sft.pth"]) == 0
    assert main(["export", str(RUN.path), "--to", "hf", "-o", "merged"]) == 0
    shape: Any = {"num_heads": 4}
    back = load_model(
        ModelConfig(source="out/sft.pth", shape=shape), torch.device("cpu")
    ).state_dict()
    plain = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], plain[name]) for name in plain)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_export_refuses_a_model_that_is_no_longer_what_was_trained_on(
    method: str, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    Path("tiny").unlink()
    shutil.copytree(shared / "tiny", "tiny")
    train(f"model.method={method}")
    build_model(copy.deepcopy(TINY_QWEN3), seed=9).save_pretrained("tiny")
    assert "other weights than the model that runs/run/last was" in error_of(
        capsys, "export", str(RUN.path), "--to", "hf", "--weights", "last"
    )
    shutil.rmtree("tiny")
    assert "is no longer there" in error_of(capsys, "export", str(RUN.path), "--to", "hf")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_an_export_from_another_directory_is_the_same_model(
    init: str, precision: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("model.method=lora", f"model.precision={precision}", f"model.init={init}", "train.seed=3")
    assert main(["export", str(RUN.path), "--to", "hf", "-o", "here"]) == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr("socket.socket.connect", None)
    assert main(["export", str(place / RUN.path), "--to", "hf", "-o", "there"]) == 0
    here, there = (
        load_file(place / path / "model.safetensors") for path in ("here", "elsewhere/there")
    )
    assert all(torch.equal(here[name], there[name]) for name in here)
    base = load_model(
        ModelConfig(source=str(place / "tiny"), init=init), torch.device("cpu"), seed=3
    ).state_dict()
    untrained = [name for name in here if "embed_tokens" in name]
    assert all(
        torch.equal(here[name].float(), base[name].to(here[name].dtype).float())
        for name in untrained
    )


def test_adapters_of_an_unknown_model_are_not_merged(capsys: pytest.CaptureFixture[str]) -> None:
    train("model.method=lora")
    (RUN.last / "adapted_model.json").unlink()
    assert "which model these adapters belong to" in error_of(
        capsys, "export", str(RUN.path), "--to", "hf", "--weights", "last"
    )


@pytest.mark.parametrize("loss", ["auto", "full"])
def test_weights_that_are_not_finite_are_the_cause_that_is_named(
    loss: str, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny").unlink()
    shutil.copytree(shared / "tiny", "tiny")
    tensors = load_file("tiny/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(tensors, "tiny/model.safetensors", metadata={"format": "pt"})
    error = error_of(
        capsys,
        "train",
        "sft.yaml",
        f"loss={loss}",
        "train.steps=9",
        exit_code=2 if loss == "auto" else 1,
    )
    assert "model.layers.0.mlp.up_proj.weight" in error
    assert "computes its logits" not in error


@pytest.fixture
def too_large_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each update of SGD write infinity into all weights."""

    def step(optimizer: torch.optim.SGD, closure: None = None) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", step)


@pytest.mark.parametrize("save_every", [1, 9])
@pytest.mark.usefixtures("too_large_updates")
def test_no_weights_are_promised_that_are_not_there(
    save_every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["optim.name=sgd", "train.steps=20", f"train.save_every={save_every}"]
    error = error_of(capsys, "train", "sft.yaml", *rest, exit_code=1)
    assert "is not finite itself: an earlier update was too large, lower optim.lr (0.01)" in error
    assert error.rstrip().endswith("no weights were saved before that")


def test_saved_weights_are_looked_at_before_they_are_promised(tmp_path: Path) -> None:
    assert saved_not_finite(tmp_path) == "nothing"
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert saved_not_finite(tmp_path) is None
    save_file(
        {"a": torch.ones(3), "b": torch.tensor([1.0, math.inf])}, tmp_path / "model.safetensors"
    )
    assert saved_not_finite(tmp_path) == "b"
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert saved_not_finite(tmp_path) is not None


def test_minimind_gets_float16_unless_told_otherwise() -> None:
    train()
    assert main(["export", str(RUN.path), "--to", "minimind"]) == 0
    tensors = torch.load(RUN.path / "export-minimind.pth", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_an_export_never_writes_over_something(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    Path("mine").write_text("kept")
    assert "mine exists" in error_of(capsys, "export", str(RUN.path), "--to", "hf", "-o", "mine")
    assert Path("mine").read_text() == "kept"


def test_an_export_of_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not the directory of a run" in error_of(capsys, "export", "tiny", "--to", "hf")


def test_an_existing_run_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    before = {path: path.stat().st_mtime_ns for path in RUN.path.rglob("*")}
    monkeypatch.setattr("fitune.training.prepare.prepare", None)
    assert "--overwrite" in error_of(capsys, "train", "sft.yaml")
    assert {path: path.stat().st_mtime_ns for path in RUN.path.rglob("*")} == before


def test_overwrite_replaces_a_run_and_keeps_what_a_person_put_there() -> None:
    train("train.seed=1", "data.eval_fraction=0.2")
    (RUN.path / "notes.txt").write_text("kept")
    summary = train("--overwrite", "data.eval_fraction=0")
    assert summary.eval_loss is None
    assert not RUN.best.exists()
    assert len(read_metrics(RUN.metrics).steps) == 3
    assert (RUN.path / "notes.txt").read_text() == "kept"


def test_a_run_without_a_name_is_called_after_model_and_data() -> None:
    write_config(Path("sft.yaml"), {"run": {"name": None}})
    for _ in range(2):
        assert main(["train", "sft.yaml", "train.steps=1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "tiny-sft-0001",
        "tiny-sft-0002",
    ]


@pytest.mark.usefixtures("planned")
def test_a_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert main(["train", "sft.yaml", "--dry-run"]) == 0
    output, notes = capsys.readouterr()
    assert output == ""
    assert "nothing was written" in notes
    assert sorted(place.rglob("*")) == before


def test_a_run_that_was_cut_off_is_offered_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    train("train.steps=1")
    RUN.summary.unlink()
    error = error_of(capsys, "train", "sft.yaml", "--dry-run", exit_code=2)
    assert "runs/run exists and is not finished: --resume runs/run goes on with it" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run.name=taken"], "runs/taken exists and is not finished: --resume runs/taken goes on"),
        (["run.name=../escaped"], "is not the name of a directory"),
        (
            ["run.output=sft.jsonl"],
            "sft.jsonl is not a directory, and run.output needs one: give another run.output",
        ),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_place_that_cannot_be_taken_is_refused_at_once(
    words: list[str],
    dry: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("runs/taken/checkpoints").mkdir(parents=True)
    Path("runs/taken/config.yaml").touch()
    RunDirectory(Path("runs/taken")).lock.touch()
    monkeypatch.delattr("fitune.training.session._prepare")
    assert main(["train", "sft.yaml", *words, *dry]) == 2
    assert sentence in capsys.readouterr().err


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    train("--format", "json")
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"schema": 1, "run": "runs/run", "summary": json.loads(RUN.summary.read_text())}


def test_quiet_is_the_place_of_the_run_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    train("--format", "quiet")
    assert capsys.readouterr() == ("runs/run\n", "")


def test_a_run_without_evaluation_has_only_its_last_weights() -> None:
    summary = train("data.eval_fraction=0")
    assert (summary.eval_loss, summary.best_eval_loss) == (None, None)
    assert read_metrics(RUN.metrics).evals == ()
    assert RUN.last.is_dir()
    assert not RUN.best.exists()


def test_evaluation_data_of_its_own_is_used_whole(place: Path) -> None:
    write_dialogues(place / "eval.jsonl", 20, seed=9)
    write_config(place / "sft.yaml", {"data": {"eval": "eval.jsonl", "eval_fraction": 0.01}})
    train()
    assert (
        read_metrics(RUN.metrics).evals[-1].eval_tokens
        == load_examples(
            read_config(RUN.config).config.data, AutoTokenizer.from_pretrained("tiny"), split="eval"
        ).num_supervised_tokens
    )


def test_stop_after_saves_and_stops() -> None:
    summary = train("train.steps=1000000", "train.stop_after=0.2s", "train.eval_every=1000000")
    assert summary.status == "stopped"
    assert 0 < summary.steps < 1000000
    assert plain_eval_loss(RUN.last) > 0
    assert [event.kind for event in read_events(RUN.events)] == ["stopped"]


def interrupt_at(
    step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT
) -> None:
    def interrupt(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        if metrics.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(TrainingProgress, "step", interrupt)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_that_it_came_in(
    number: signal.Signals,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    constant = ("optim.schedule=constant", "optim.warmup=0")
    train("run.name=two", "train.steps=2", *constant)
    interrupt_at(2, monkeypatch, number)
    error = error_of(capsys, "train", "sft.yaml", "train.steps=50", *constant, exit_code=exit_code)
    assert "saved after step 2 in runs/run/last" in error
    assert read_run(RUN.path).state == "stopped"
    assert weights(RUN.last) == weights(Path("runs/two/last"))


def test_signals_act_as_before_once_a_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(1, monkeypatch)
    assert main(["train", "sft.yaml"]) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_ends_the_process_with_saved_weights() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fitune",
            "train",
            "sft.yaml",
            "train.steps=1000000",
            "train.eval_every=1000000",
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while (
        not (RUN.metrics.exists() and b'"loss"' in RUN.metrics.read_bytes())
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: interrupted: saved after step")
    assert plain_eval_loss(RUN.last) > 0


def test_a_loss_that_stays_not_finite_ends_the_run_with_the_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(
        capsys,
        "train",
        "sft.yaml",
        "optim.lr=1000",
        "train.steps=50",
        "train.eval_every=50",
        exit_code=1,
    )
    assert "not finite in 3 steps in a row" in error
    assert "lower optim.lr (1000)" in error
    assert read_run(RUN.path).state == "failed"
    assert [event.kind for event in read_events(RUN.events)] == ["not_finite"] * 3


@pytest.mark.usefixtures("too_large_updates")
def test_an_evaluation_that_is_not_a_number_is_never_the_best() -> None:
    main(["train", "sft.yaml", "optim.name=sgd", "train.eval_every=1"])
    assert math.isnan(read_metrics(RUN.metrics).evals[1].eval_loss)
    assert not RUN.best.exists()
    assert read_summary(RUN.summary).best_eval_loss is None


def test_rows_are_tokenised_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(place / "cache"))
    train()
    tables = {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("rows.arrow")}
    train("run.name=second")
    assert len(tables) == 1
    assert {
        path: path.stat().st_mtime_ns for path in (place / "cache").rglob("rows.arrow")
    } == tables


def test_a_preset_is_trained_from_scratch_with_a_tokenizer_from_elsewhere() -> None:
    save_tiny_model(Path("qwen3"), TINY_QWEN3)
    summary = train(
        "model.source=qwen3", "model.tokenizer=tiny", "model.init=random", "train.seed=5"
    )
    assert summary.status == "finished"


def test_weights_of_a_source_stay_as_they_are(shared: Path) -> None:
    before = weights(shared / "tiny")
    train()
    assert weights(shared / "tiny") == before != weights(RUN.last)


@pytest.mark.parametrize(
    "name", ["adamw", "adamw_foreach", "adafactor", "muon", "apollo", "apollo_mini", "sgd"]
)
def test_every_optimizer_trains(name: str) -> None:
    summary = train(f"optim.name={name}", "train.steps=8")
    assert summary.eval_loss is not None
    assert summary.eval_loss < read_metrics(RUN.metrics).evals[0].eval_loss


@pytest.mark.parametrize("recompute", ["off", "every_2", "full", "selective"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputing_changes_no_result(recompute: str, method: str) -> None:
    plain = train(f"model.method={method}", "run.name=plain")
    summary = train(f"model.method={method}", f"model.recompute={recompute}")
    assert summary.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)


def test_the_written_configuration_is_plain_yaml() -> None:
    train()
    assert yaml.safe_load(RUN.config.read_text())["batch"]["effective"] == 8


def test_python_trains_by_a_mapping_a_file_or_a_configuration(place: Path) -> None:
    mapping: dict[str, Any] = yaml.safe_load((place / "sft.yaml").read_text())
    summaries = [
        fitune.train(config, overwrite=True, quiet=True)
        for config in (mapping, "sft.yaml", place / "sft.yaml", read_config("sft.yaml").config)
    ]
    assert {summary.train_loss for summary in summaries} == {
        train("train.steps=null", "run.name=cli").train_loss
    }


def test_python_gets_an_error_as_an_exception() -> None:
    with pytest.raises(errors.ConfigError, match=r"optim\.lr is -1"):
        fitune.train(
            {"model": {"source": "tiny"}, "data": {"train": "sft.jsonl"}, "optim": {"lr": -1}}
        )


@pytest.mark.parametrize("first", ["import fitune", "from fitune import train"])
def test_importing_fitune_imports_nothing_heavy(first: str) -> None:
    code = (
        f"{first}; import fitune, sys; assert callable(fitune.train); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.usefixtures("planned")
def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_loaded_unless_it_is_told_to_try(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "sft.yaml", "memory.budget=10MiB"]) == 3
    assert "no plan fits 10.0 MiB" in capsys.readouterr().err
    assert not RUN.path.exists()
