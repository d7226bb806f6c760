"""Runs of preferences: resumed, repeated, short of memory and predicted as those of supervised tokens are."""

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from torch._subclasses.fake_tensor import is_fake

from disturbed_run import assert_same, predict_nothing, train, train_until
from faults import out_of_memory
from fitune.config import RunConfig, read_config
from fitune.data.rows import MicroBatch
from fitune.errors import RunDirectoryError
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.objectives.preference import Preference
from fitune.recorder.cuda_target import CudaTarget
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import read_events, read_metrics
from fitune.trace.library import Recordings
from fitune.trace.own_step import Pass, longest_rows, record_step, steady_passes
from tiny_models import TINY
from tiny_run import save_tiny_model, write_config

RUN, UNDISTURBED = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/undisturbed"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with tiny/, pairs.jsonl and dpo.yaml, where nothing is predicted."""
    predict_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny")
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(1, 50)}" for _ in range(draw.randint(1, most)))

    with Path("pairs.jsonl").open("w") as file:
        for _ in range(40):
            prompt = words(8)
            row = {"prompt": prompt, "chosen": prompt, "rejected": "w0 w0 w0"}
            file.write(json.dumps(row) + "\n")
    train_section = {"steps": 5, "save_every": 2, "eval_every": 3}
    path = write_config(
        Path("dpo.yaml"),
        {"data": {"train": "pairs.jsonl"}, "train": train_section, "optim": {"lr": 0.003}},
    )
    path.write_text(path.read_text() + "objective: dpo\n")
    return tmp_path


def test_a_resumed_and_a_repeated_run_are_the_undisturbed_one_bit_for_bit(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("dpo.yaml", "run.name=undisturbed")
    train_until(4, "dpo.yaml", monkeypatch=monkeypatch)
    with monkeypatch.context() as patched:
        # the reference's log-probabilities are read: these weights are trained
        patched.setattr("fitune.training.reference.compute_reference", None)
        train("--resume", "runs/run")
        assert_same()
        train("--replay", "runs/run")
    first, *_, last = read_metrics(UNDISTURBED.metrics).evals
    assert last.eval_margin is not None
    assert first.eval_margin is not None
    assert last.eval_margin > first.eval_margin + 0.02
    assert first.eval_perplexity is None
    (step, *_) = read_metrics(UNDISTURBED.metrics).steps
    assert step.pair_accuracy is not None
    assert step.margin == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["adapter_off", "frozen_copy"])
def test_a_run_with_a_reference_in_each_step_is_repeated_bit_for_bit_and_survives(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ("model.method=lora", "model.lora.rank=4") if kind == "adapter_off" else ()
    args = ("dpo.yaml", f"preference.reference={kind}", "batch.micro=8", *method)
    train(*args, "run.name=undisturbed")
    assert not UNDISTURBED.reference.exists()
    train_until(4, *args, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert_same()
    real, calls = AnswerLogProbs.log_probs, itertools.count()

    def limited(objective: Any, model: Any, micro_batch: MicroBatch) -> Any:
        if len(micro_batch.row_ids) > 3 and next(calls) > 4:
            raise out_of_memory()
        return real(objective, model, micro_batch)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerLogProbs, "log_probs", limited)
        train(*args, "run.name=small")
    assert any(len(line.plan) > 1 for line in read_journal(Path("runs/small/journal.jsonl")))
    train("--replay", "runs/small")


def test_what_was_kept_of_the_reference_is_checked(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_until(4, "dpo.yaml", monkeypatch=monkeypatch)
    content = json.loads(RUN.reference.read_text())
    content["train"]["values"][3][1] += 0.5
    RUN.reference.write_text(json.dumps(content))
    train("--resume", "runs/run", exit_code=RunDirectoryError.exit_code)
    assert (
        "reference.json is damaged, and the weights are trained already" in capsys.readouterr().err
    )
    RUN.reference.unlink()
    train("--resume", "runs/run", exit_code=RunDirectoryError.exit_code)
    assert "reference.json is missing, and the weights" in capsys.readouterr().err


def test_running_out_of_memory_parts_micro_batches_and_no_pair(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("dpo.yaml", "run.name=undisturbed", "batch.micro=8")
    real, calls = Preference.loss_sum, itertools.count()

    def limited(objective: Preference, model: Any, micro_batch: MicroBatch) -> Any:
        real_one = not is_fake(next(model.parameters()))
        if len(micro_batch.row_ids) > 3 and real_one and next(calls) > 2:
            raise out_of_memory()
        return real(objective, model, micro_batch)

    monkeypatch.setattr(Preference, "loss_sum", limited)
    train("dpo.yaml", "batch.micro=8")
    assert any(event.kind == "out_of_memory" for event in read_events(RUN.events))
    ours, theirs = read_journal(RUN.journal), read_journal(UNDISTURBED.journal)
    assert any(len(line.plan) > 1 for line in ours)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.loss_weight == its.loss_weight
        assert mine.loss_sum == pytest.approx(its.loss_sum, rel=1e-4)
        assert sorted(itertools.chain(*mine.plan)) == sorted(itertools.chain(*its.plan))


def test_the_reference_of_adapters_is_the_model_under_them(place: Path) -> None:
    kinds = {"full": (), "lora": ("model.method=lora", "model.lora.rank=4")}
    kept = []
    for name, overrides in kinds.items():
        train("dpo.yaml", f"run.name={name}", "train.steps=1", *overrides)
        kept.append(json.loads((Path("runs") / name / "reference.json").read_text()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto"])
def test_each_example_trains(name: str, place: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "preferences"
    rows = example / ("answers.jsonl" if name == "kto" else "pairs.jsonl")
    model = ("model.source=tiny", "model.tokenizer=tiny", f"data.train={rows}")
    train(str(example / f"{name}.yaml"), *model)
    found = read_metrics(Path(f"runs/{name}/metrics.jsonl"))
    assert found.evals[-1].eval_margin is not None or name == "kto"
    assert (found.evals[-1].eval_kl is not None) == (name == "kto")


def config_of(directory: Path, *overrides: str, rows: int) -> RunConfig:
    config = copy.deepcopy(TINY["llama"])
    config.num_hidden_layers = 6
    config.save_pretrained(directory)
    tree: dict[str, Any] = {
        "model": {"source": str(directory), "init": "random"},
        "objective": "dpo",
        "data": {"train": "rows.jsonl", "max_length": 256},
        "batch": {"micro": rows, "accumulation": 2},
    }
    return read_config(tree, overrides).config


@pytest.mark.parametrize(
    ("method", "reference", "sizes"),
    [
        ("full", "kept", (2,)),
        ("lora", "adapter_off", (2,)),
        ("full", "frozen_copy", (2,)),
        pytest.param("full", "kept", (3, 5, 4), marks=pytest.mark.thorough),
        pytest.param("lora", "kept", (3, 5, 4), marks=pytest.mark.thorough),
        pytest.param("lora", "adapter_off", (3, 5, 4), marks=pytest.mark.thorough),
        pytest.param("full", "frozen_copy", (3, 5, 4), marks=pytest.mark.thorough),
    ],
)
def test_steps_are_derived_from_short_recordings(
    tmp_path: Path, method: str, reference: str, sizes: tuple[int, ...]
) -> None:
    recordings, target = Recordings(), CudaTarget((8, 0))
    for rows in sizes:
        overrides = f"model.method={method}", f"preference.reference={reference}"
        config = config_of(tmp_path, *overrides, rows=rows)
        samples = longest_rows(config.sample_tokens, num_rows=2 * rows)
        evaluation = Pass("eval", samples[:rows], most_micro_batches=1)
        passes = steady_passes(config.optim, Pass("train", samples), evaluation=evaluation)
        whole = record_step(config, passes, target=target)
        short = recordings.step(config, passes, target=target)
        assert short.trace.events == whole.trace.events
