"""KTO: losses and gradients are those of TRL's KTOTrainer for every split; runs are resumed, repeated and short of memory."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from disturbed_run import assert_same, predict_nothing, train, train_until
from faults import out_of_memory
from fitune.config import PreferenceConfig, read_config
from fitune.data.examples import load_examples
from fitune.data.packing import split
from fitune.data.rows import Batch, Labelled, MicroBatch, Row
from fitune.data.unpacking import rows_of
from fitune.model.head import decoder_and_head
from fitune.objectives.kto import KahnemanTversky
from fitune.objectives.log_probs import AnswerLogProbs, LiveReference
from fitune.recorder.cuda_target import CudaTarget
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import read_metrics
from fitune.step.evaluate import evaluate
from fitune.step.work import StepSettings, train_step
from fitune.trace.library import Recordings
from fitune.trace.own_step import Pass, longest_rows, record_step, steady_passes
from objectives.test_preference_runs import config_of
from tiny_run import save_tiny_model, write_config
from tiny_steps import Capture, make_model

RUN, UNDISTURBED = RunDirectory(Path("runs/run")), RunDirectory(Path("runs/undisturbed"))
#: tokens of prompt and answer of each sample, and whether the answer is desirable
ANSWERS = ((3, 6, True), (2, 3, False), (5, 16, True), (4, 2, True), (1, 13, False))
SETTINGS = PreferenceConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
SPLITS: tuple[dict[str, int], ...] = ({"micro_rows": 5}, {"micro_rows": 1}, {"micro_tokens": 24})


def trl_rows() -> list[dict[str, Any]]:
    """Prompts and answers as token ids, with the answer of the sample before each as TRL pairs them."""
    draw = np.random.default_rng(0)
    rows = [
        {"prompt_ids": draw.integers(0, 64, prompt).tolist(),
         "completion_ids": draw.integers(0, 64, answer).tolist(), "label": label}
        for prompt, answer, label in ANSWERS
    ]  # fmt: skip
    for number, row in enumerate(rows):
        row["KL_completion_ids"] = rows[number - 1]["completion_ids"]
    return rows


def sequence(
    prompt: list[int], answer: list[int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    ids = np.array([*prompt, *answer], np.int32)
    return ids, (np.arange(len(ids)) >= len(prompt)).astype(np.float32)


def labelled_batch() -> Batch:
    return Batch(
        tuple(
            Row(
                number,
                *sequence(row["prompt_ids"], row["completion_ids"]),
                Labelled(row["label"], sequence(row["prompt_ids"], row["KL_completion_ids"])),
            )
            for number, row in enumerate(trl_rows())
        )
    )


def trl_loss_and_gradient(
    model: nn.Module, reference: nn.Module | None, directory: Path
) -> tuple[float, torch.Tensor]:
    """Return what TRL's KTOTrainer computes of all samples in one batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import KTOConfig, KTOTrainer

    class Tokenised(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    arguments = KTOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=len(ANSWERS),
        beta=SETTINGS.beta,
        desirable_weight=SETTINGS.desirable_weight,
        undesirable_weight=SETTINGS.undesirable_weight,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = Tokenised(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(
            [row | {"prompt": "", "completion": ""} for row in trl_rows()]
        ),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
        ),
    )
    loss = trainer.compute_loss(model, trainer.data_collator(trl_rows()))
    loss.backward()
    capture = Capture(model.parameters())
    capture.step()
    return loss.item(), capture.vector()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_are_those_of_trl_for_every_split(method: str, tmp_path: Path) -> None:
    is_full = method == "full"
    model = make_model(lora=not is_full, tied=False)
    # before TRL makes its fused forwards of both
    trained, reference = copy.deepcopy(model), copy.deepcopy(model)
    if is_full:
        with torch.no_grad():
            for mine, theirs in zip(trained.parameters(), model.parameters(), strict=True):
                mine += 0.05 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
                theirs.copy_(mine)
    if not is_full:
        # TRL takes the adapter that it is given as the reference: its copy of the base stands for it
        reference = copy.deepcopy(model).unload()
    wanted_loss, wanted = trl_loss_and_gradient(model, copy.deepcopy(reference), tmp_path)
    batch = labelled_batch()
    for loss, live in itertools.product(("full", "chunked"), (True, False)):
        head, copied = None, None
        if loss == "chunked":
            head, copied = decoder_and_head(trained), decoder_and_head(reference)
        assert not isinstance(head, str)
        assert not isinstance(copied, str)
        source = LiveReference(reference, copied) if is_full else LiveReference()
        objective = KahnemanTversky(head, 8, settings=SETTINGS, reference=source if live else None)
        rows = batch if live else kept(batch, reference)
        settings = StepSettings(objective, clip=0.0)
        for packed, sizes in itertools.product((True, False), SPLITS):
            optimizer = Capture(trained.parameters())
            pieces = split(rows, packed=packed, **sizes)
            result = train_step(trained, optimizer, pieces, settings=settings)
            assert result.loss == pytest.approx(wanted_loss, rel=1e-5)
            error = (optimizer.vector() - wanted).norm() / wanted.norm()
            assert error < 1e-5, (loss, live, packed, sizes)
            found = evaluate(trained, pieces, settings=settings)
            assert found.loss == pytest.approx(wanted_loss, rel=1e-5)


def kept(batch: Batch, reference: nn.Module) -> Batch:
    """Return the samples with the log-probabilities that a run keeps."""
    head = decoder_and_head(reference)
    assert not isinstance(head, str)
    scoring = StepSettings(KahnemanTversky(head, 8).as_supervised())
    singles = Batch(
        tuple(
            Row(2 * row.row_id + place, *each)
            for row in batch.rows
            for place, each in enumerate(row.compared)
        )
    )
    losses = evaluate(reference, split(singles, packed=True, micro_rows=3), settings=scoring)
    values = -np.array(losses.row_losses).reshape(-1, 2)
    return Batch(
        tuple(
            replace(row, judged=replace(row.judged, reference=tuple(value)))  # type: ignore[type-var]
            for row, value in zip(batch.rows, values.tolist(), strict=True)
        )
    )


def test_samples_come_back_from_micro_batches() -> None:
    batch = labelled_batch()
    for packed in (True, False):
        (whole,) = split(batch, packed=packed, micro_rows=9)
        for row, again in zip(batch.rows, rows_of(whole), strict=True):
            assert isinstance(row.judged, Labelled)
            assert isinstance(again.judged, Labelled)
            assert again.judged.is_desirable == row.judged.is_desirable
            for mine, its in zip(again.compared, row.compared, strict=True):
                assert np.array_equal(mine[0], its[0])
                assert np.array_equal(mine[1], its[1])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with tiny/, answers.jsonl and kto.yaml, where nothing is predicted."""
    predict_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny")
    rows = [
        {"prompt": f"w{n} w{n % 7}", "completion": f"w{n} w1" if n % 3 else "w0 w0 w0", "label": bool(n % 3)}
        for n in range(40)
    ]  # fmt: skip
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"steps": 5, "save_every": 2, "eval_every": 3}
    tree = {"data": {"train": "answers.jsonl"}, "train": section, "optim": {"lr": 0.003}}
    path = write_config(Path("kto.yaml"), tree)
    path.write_text(path.read_text() + "objective: kto\n")
    return tmp_path


def test_a_run_is_resumed_and_repeated_bit_for_bit_and_survives(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = ("model.method=lora", "model.lora.rank=4", "batch.micro=8")
    train("kto.yaml", "run.name=undisturbed", *adapters)
    last = read_metrics(UNDISTURBED.metrics)
    assert last.steps[-1].kl is not None
    assert last.evals[-1].eval_kl is not None
    train_until(4, "kto.yaml", *adapters, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert_same()
    real, calls = AnswerLogProbs.log_probs, itertools.count()

    def limited(objective: Any, model: Any, micro_batch: MicroBatch) -> Any:
        if len(micro_batch.row_ids) > 3 and next(calls) > 4:
            raise out_of_memory()
        return real(objective, model, micro_batch)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerLogProbs, "log_probs", limited)
        train("kto.yaml", "run.name=small", *adapters)
    small = read_journal(Path("runs/small/journal.jsonl"))
    assert any(len(line.plan) > 1 for line in small)
    train("--replay", "runs/small")
    for mine, its in zip(small, read_journal(UNDISTURBED.journal), strict=True):
        assert mine.loss_sum == pytest.approx(its.loss_sum, rel=1e-4)


def test_a_prompt_is_paired_with_the_answer_before_it(place: Path) -> None:
    from fitune.model.load import load_tokenizer

    config = read_config(Path("kto.yaml")).config
    rows = load_examples(config.data, load_tokenizer(config.model), kind="labelled")
    for number in (0, 7):
        row, before = rows[number], rows[(number - 1) % len(rows)]
        assert isinstance(row.judged, Labelled)
        ids, weights = row.judged.mismatched
        prompt, start = row.loss_weights.argmax(), before.loss_weights.argmax()
        assert ids.tolist() == [*row.input_ids[:prompt], *before.input_ids[start:]]
        assert weights[:prompt].sum() == 0
        assert weights[prompt:].tolist() == before.loss_weights[start:].tolist()
    labels = [isinstance(row.judged, Labelled) and row.judged.is_desirable for row in rows]
    assert 0.5 < sum(labels) / len(labels) < 0.8


@pytest.mark.parametrize(
    ("method", "reference"), [("full", "kept"), ("full", "frozen_copy"), ("lora", "adapter_off")]
)
def test_steps_are_derived_from_short_recordings(
    tmp_path: Path, method: str, reference: str
) -> None:
    recordings, target, rows = Recordings(), CudaTarget((8, 0)), 2
    overrides = f"model.method={method}", f"preference.reference={reference}", "objective=kto"
    config = config_of(tmp_path, *overrides, rows=rows)
    samples = longest_rows(config.sample_tokens, num_rows=2 * rows)
    evaluation = Pass("eval", samples[:rows], most_micro_batches=1)
    passes = steady_passes(config.optim, Pass("train", samples), evaluation=evaluation)
    whole = record_step(config, passes, target=target)
    short = recordings.columns(config, passes, target=target)
    assert short is not None
    assert short.to_step().trace.events == whole.trace.events
