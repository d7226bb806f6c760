"""`eval.prompts`: what is answered at evaluations, without a trace in the training."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from disturbed_run import RUN, STEPS, UNDISTURBED, error_of, train, train_until, weights
from fitune.cli.app import main
from fitune.report.compare import compare
from fitune.report.document import page_content
from fitune.run.answers import read_answers
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import read_events

pytestmark = pytest.mark.usefixtures("disturbed")
ASKED = RunDirectory(Path("runs/asked"))
PROMPTS = ('eval.prompts=["w1 w2", "w3"]', "eval.new_tokens=6")
LORA = ("model.method=lora", "model.lora.dropout=0.3")


def last_hash(run: RunDirectory) -> str:
    return read_journal(run.journal)[-1].hash


def test_answers_do_not_change_the_run_and_a_resumed_run_has_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train("sft.yaml", "run.name=undisturbed", "--overwrite", *LORA)
    train("sft.yaml", "run.name=asked", *LORA, *PROMPTS)
    train_until(5, "sft.yaml", *LORA, *PROMPTS, monkeypatch=monkeypatch)
    train("--resume", "runs/run")
    assert last_hash(ASKED) == last_hash(UNDISTURBED) == last_hash(RUN)
    assert (ASKED.answers).read_bytes() == RUN.answers.read_bytes()
    answers = read_answers(RUN.answers)
    assert [(line.step, line.prompt) for line in answers] == [
        (step, prompt) for step in (0, 3, 6, 9) for prompt in ("w1 w2", "w3")
    ]
    assert all(0 < line.num_tokens <= 6 for line in answers)
    shown = str(page_content(compare((RUN.path,)))["sections"]["answers"])  # type: ignore[index]
    assert repr(answers[-1].answer) in shown


def test_answers_after_the_last_save_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No evaluation but the first is a best one, which would be saved."""
    rates = ("optim.lr=1e-15", "train.eval_every=1", "train.save_every=4")
    train_until(7, "sft.yaml", *PROMPTS, *rates, monkeypatch=monkeypatch)
    assert read_answers(RUN.answers)[-1].step == 6
    train("--resume", "runs/run")
    assert len(RUN.answers.read_text().splitlines()) == 2 * (1 + STEPS)


def test_a_run_goes_on_where_an_answer_finds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fitune.training.answers.generate", out_of_memory)
    train("sft.yaml", *PROMPTS)
    assert weights(RUN) == weights(UNDISTURBED)
    events = [event for event in read_events(RUN.events) if event.kind == "answers_left_out"]
    assert [event.step for event in events] == [0, 3, 6, 9]
    assert not RUN.answers.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval.new_tokens=7",), "eval.new_tokens has no effect without eval.prompts"),
        ((PROMPTS[0], "data.eval_fraction=0", "train.eval_every=auto"), "answered at evaluations"),
        ((PROMPTS[0], "eval.new_tokens=62"), "it exceeds data.max_length 64: shorten it"),
        ((PROMPTS[0], "model.shard=full"), "eval.prompts does not work with model.shard full"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, "sft.yaml", *arguments)
    assert not RUN.path.exists()


def test_a_watcher_sees_the_last_answers(capsys: pytest.CaptureFixture[str]) -> None:
    train("sft.yaml", *PROMPTS)
    last = read_answers(RUN.answers)[-1]

    capsys.readouterr()
    assert main(["watch", "run", "--once"]) == 0
    assert f"step 9  w3  > {last.answer}" in capsys.readouterr().out
    assert main(["watch", "run", "--once", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["answers"]
    assert [line["prompt"] for line in shown] == ["w1 w2", "w3"]


def test_what_is_saved_has_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{# mine #}"
    )
    train("sft.yaml", f"data.template={template}", "train.steps=1", "train.eval_every=1")
    saved = AutoTokenizer.from_pretrained(RUN.last)
    assert saved.chat_template == template.read_text()
