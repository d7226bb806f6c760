"""The model card of an export: what was measured, under the header that model hubs read."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from disturbed_run import UNDISTURBED
from fitune.cli.app import main
from fitune.model.saved import source_license
from fitune.report.model_card import Exported, model_card
from fitune.report.run_on_disk import read_fitune_run
from fitune.run.metrics import read_metrics, read_summary

pytestmark = pytest.mark.usefixtures("disturbed")


def header_of(card: str) -> dict[str, object]:
    header = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(header, dict)
    return header


def test_a_card_says_what_was_measured_and_no_place_on_this_machine() -> None:
    shared, base = Path("tiny").resolve(), Path("tiny")
    base.unlink()  # a link to what other tests use
    shutil.copytree(shared, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["export", "undisturbed", "--to", "hf", "-o", "out"]) == 0
    card = (Path("out") / "README.md").read_text(encoding="utf-8")
    assert header_of(card) == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["fitune", "sft"],
    }  # fmt: skip
    best = min(
        (line for line in read_metrics(UNDISTURBED.metrics).evals if line.step),
        key=lambda line: line.eval_loss,
    )
    assert f"| held-out loss | {best.eval_loss:.4f} |" in card
    assert f"best evaluation, after step {best.step}." in card
    summary = read_summary(UNDISTURBED.summary)
    assert f"| tokens seen | {summary.tokens:,} |" in card
    assert "| effective batch (samples) | 8 |" in card
    data = json.loads(UNDISTURBED.data.read_text())["train"]
    assert f"| training | {data['num_rows']} | {data['num_tokens']:,} |" in card
    assert "- `sft.jsonl`: 60 samples (messages)" in card
    assert str(Path.cwd()) not in card


def test_a_card_names_a_base_and_data_of_the_hub() -> None:
    run = read_fitune_run(UNDISTURBED.path)
    config, data = UNDISTURBED.config.read_text(), json.loads(UNDISTURBED.data.read_text())
    assert "source: tiny" in config
    UNDISTURBED.config.write_text(config.replace("source: tiny", "source: org/base"))
    data["sources"][0]["path"] = "org/dialogues"
    UNDISTURBED.data.write_text(json.dumps(data))
    run = read_fitune_run(UNDISTURBED.path)
    header = header_of(model_card(run, Exported(kind="adapter", weights="last")))
    assert header["base_model"] == "org/base"
    assert header["base_model_relation"] == "adapter"
    assert header["datasets"] == ["org/dialogues"]
    assert header["library_name"] == "peft"


def test_a_model_is_exported_when_its_base_is_gone() -> None:
    Path("tiny").unlink()
    config = UNDISTURBED.config.read_text().replace("source: tiny", "source: ./tiny")
    UNDISTURBED.config.write_text(config)
    assert main(["export", "undisturbed", "--to", "hf", "-o", "out"]) == 0
    assert "license" not in header_of((Path("out") / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["", "license: mit", "---\nlicense: [a\n---\n", "---\n- 1\n---\n"])
def test_a_licence_that_nobody_names_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert source_license(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "hf", "--quantise", "q8_0"), "--quantise is of a whole model as GGUF"),
        (("--to", "hf", "--exact"), "--exact has no effect with --to hf"),
        (("--to", "minimind", "--adapter"), "--to minimind merges adapters"),
        (("--to", "hf", "--adapter"), "best holds no adapters: drop --adapter"),
        (("--to", "gguf"), "the tokenizer has a WordLevel model"),
    ],
)
def test_a_flag_without_effect_and_a_model_without_place_are_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "undisturbed", *flags, "-o", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
