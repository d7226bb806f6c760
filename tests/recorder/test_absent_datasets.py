"""Data sets that are not here have the form that the script's trainer takes, and its longest length."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import modeling_utils as modeling

from fitune.errors import UsageError
from fitune.recorder.absent_data import absent_data
from fitune.recorder.absent_datasets import LONG_TEXT, NUM_SAMPLES, refuse_uncut
from fitune.recorder.script_libraries import models_of_configs


@pytest.fixture(autouse=True)
def without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the process of a script, which is told so before it imports anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def note(_: str) -> None: ...


@pytest.mark.parametrize(
    ("trainer", "columns"),
    [
        ("sft_trainer", {"messages", "text"}),
        ("dpo_trainer", {"prompt", "chosen", "rejected"}),
        ("kto_trainer", {"prompt", "completion", "label"}),
    ],
)
def test_a_trainer_of_trl_gets_samples_of_its_form(
    trainer: str, columns: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("trl.trainer.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, f"trl.trainer.{trainer}", ModuleType(trainer))
    with absent_data(note):
        found = datasets.load_dataset("nobody/nothing")
    assert isinstance(found["train"], datasets.Dataset)
    assert set(found["train"].column_names) == columns


def test_a_trainer_that_generates_its_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.grpo_trainer", ModuleType("grpo_trainer"))
    with absent_data(note), pytest.raises(UsageError, match="text that its model generates"):
        datasets.load_dataset("nobody/nothing")


def test_what_a_script_makes_of_a_sample_is_made_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("trl.trainer.")]:
        monkeypatch.delitem(sys.modules, name)
    with absent_data(note):
        rows = datasets.load_dataset("nobody/nothing", split="train")
        one = rows.shuffle(seed=1).map(
            lambda row: {"ids": [len(row["instruction"]), len(row["output"])]},
            remove_columns=rows.column_names,
        )
        many = rows.map(lambda batch: {"n": [len(text) for text in batch["text"]]}, batched=True)
    assert isinstance(rows, datasets.Dataset)
    assert list(rows.features) == rows.column_names == ["text"]  # scripts take the first
    assert one[7]["ids"][1] == len(LONG_TEXT) > one[7]["ids"][0]
    assert many[NUM_SAMPLES - 1] == {"n": len(LONG_TEXT)}


def test_a_script_that_cuts_no_sample_is_refused() -> None:
    refuse_uncut(list(range(30_000)))
    with pytest.raises(UsageError, match=r"up to 30,000 tokens of them: give it a longest length"):
        refuse_uncut([1, 2, 3] * 10_000)


def test_a_filter_that_finds_all_samples_too_long_leaves_the_longest_that_it_keeps() -> None:
    with absent_data(note):
        rows = datasets.Dataset.from_dict({"chosen_ids": [list(range(1000))] * NUM_SAMPLES})
        kept = rows.filter(lambda row: len(row["chosen_ids"]) <= 300, num_proc=2)
        batched = rows.filter(
            lambda rows: [len(ids) <= 300 for ids in rows["chosen_ids"]], batched=True
        )
    assert batched[0] == kept[0]
    assert len(kept) == NUM_SAMPLES
    assert len(kept[0]["chosen_ids"]) == 300


def test_a_model_has_the_dtype_that_it_is_loaded_in_whatever_its_configuration_says(
    tmp_path: Path,
) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
    heads = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with models_of_configs(modeling, note, has_card=False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        as_saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert as_saved.dtype == torch.bfloat16
