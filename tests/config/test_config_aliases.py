"""The words of transformers and peft are read as the keys that they stand for."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.config import read_config
from fitune.config.aliases import ALIASES
from fitune.errors import ConfigError

GOOD: dict[str, Any] = {"model": {"source": "tiny"}, "data": {"train": "sft.jsonl"}}
VALUES = {
    "model.lora.r": 8,
    "model.lora.lora_alpha": 64.0,
    "model.lora.lora_dropout": 0.1,
    "model.lora.target_modules": "q_proj",
    "model.lora.use_rslora": True,
    "model.lora.use_dora": True,
    "model.lora.init_lora_weights": "olora",
    "model.gradient_checkpointing": "every_2",
    "data.max_samples": 7,
    "optim.learning_rate": 3e-5,
    "optim.max_grad_norm": 0.5,
    "batch.effective_batch_size": 24,
    "batch.micro_batch_size": 4,
    "batch.micro_batch_tokens": 4096,
    "batch.gradient_accumulation_steps": 6,
    "memory.limit": "10GiB",
    "eval.micro_batch_size": 3,
    "eval.max_samples": 50,
}


def with_value(*pairs: tuple[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(GOOD)
    for key, value in pairs:
        *sections, name = key.split(".")
        holder = tree
        for part in sections:
            holder = holder.setdefault(part, {})
        holder[name] = value
    if method_of(pairs[0][0]):
        tree["model"]["method"] = "lora"
    return tree


def method_of(key: str) -> list[str]:
    """Return what a key needs, to have an effect."""
    return ["model.method=lora"] if key.startswith("model.lora.") else []


def typed(key: str, value: object) -> str:
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_an_alias_is_its_key_in_a_file_and_on_the_command_line(
    alias: str, key: str, tmp_path: Path
) -> None:
    value = VALUES[alias]
    expected = read_config(with_value((key, value)))
    assert expected.config != read_config(GOOD).config
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps(with_value((alias, value)), indent=1))
    read = read_config(path)
    assert read.config == expected.config
    assert read.origins[key].startswith(f"{path}:")
    overridden = read_config(GOOD, [typed(alias, value), *method_of(alias)])
    assert overridden.config == expected.config
    assert overridden.origins[key] == "command line"


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_a_key_and_its_alias_are_one_clear_error(alias: str, key: str) -> None:
    both = with_value((alias, VALUES[alias]), (key, VALUES[alias]))
    with pytest.raises(ConfigError) as caught:
        read_config(both)
    assert str(caught.value) == f"{key} and {alias} are two names of one key: keep one"
    with pytest.raises(ConfigError) as caught:
        read_config(GOOD, [typed(name, VALUES[alias]) for name in (key, alias)] + method_of(alias))
    assert (
        str(caught.value) == f"command line: {key} and {alias} are two names of one key: keep one"
    )


def test_what_is_typed_replaces_what_the_file_says_by_another_name() -> None:
    assert (
        read_config(with_value(("batch.micro", 2)), ["batch.micro_batch_size=4"]).config.batch.micro
        == 4
    )
    assert (
        read_config(with_value(("batch.micro_batch_size", 2)), ["batch.micro=4"]).config.batch.micro
        == 4
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "full"), (False, "off"), ("selective", "selective")]
)
def test_gradient_checkpointing_is_also_a_switch(value: object, expected: str) -> None:
    assert (
        read_config(with_value(("model.gradient_checkpointing", value))).config.model.recompute
        == expected
    )
    typed = str(value).lower() if isinstance(value, bool) else str(value)
    assert (
        read_config(GOOD, [f"model.gradient_checkpointing={typed}"]).config.model.recompute
        == expected
    )


def test_a_wrong_value_is_told_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model: {source: tiny}\ndata: {train: sft.jsonl}\nbatch:\n  micro_batch_size: -1\n"
    )
    with pytest.raises(
        ConfigError,
        match=re.escape(f"{path}:4: batch.micro is -1: it must be a whole number above 0"),
    ):
        read_config(path)


def test_the_schema_for_editors_takes_the_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for alias in ALIASES:
        *sections, name = alias.split(".")
        properties = schema["properties"]
        for section in sections:
            definition = properties[section]["$ref"].rpartition("/")[2]
            properties = schema["$defs"][definition]["properties"]
        assert name in properties
