"""Accept the names that transformers, peft and trl use as aliases of our keys.

Our keys stay valid. `fitune config schema` and the documentation list the aliases too.
"""

from collections.abc import Mapping
from typing import Any

from fitune.config.yaml_lines import KeyPath

#: Alias -> our key, in the same section.
ALIASES: Mapping[str, str] = {
    "model.gradient_checkpointing": "model.recompute",
    "model.lora.r": "model.lora.rank",
    "model.lora.lora_alpha": "model.lora.alpha",
    "model.lora.lora_dropout": "model.lora.dropout",
    "model.lora.target_modules": "model.lora.targets",
    "model.lora.use_rslora": "model.lora.rslora",
    "model.lora.use_dora": "model.lora.dora",
    "model.lora.init_lora_weights": "model.lora.init",
    "data.max_samples": "data.max_rows",
    "optim.learning_rate": "optim.lr",
    "optim.max_grad_norm": "optim.clip",
    "batch.effective_batch_size": "batch.effective",
    "batch.micro_batch_size": "batch.micro",
    "batch.micro_batch_tokens": "batch.micro_tokens",
    "batch.gradient_accumulation_steps": "batch.accumulation",
    "memory.limit": "memory.budget",
    "eval.micro_batch_size": "eval.micro",
    "eval.max_samples": "eval.max_rows",
}

OWN_PATHS: Mapping[KeyPath, KeyPath] = {
    tuple(name.split(".")): tuple(key.split(".")) for name, key in ALIASES.items()
}
_SWITCHES: Mapping[KeyPath, Mapping[bool | str, str]] = {
    ("model", "gradient_checkpointing"): {
        True: "full",
        False: "off",
        "true": "full",
        "false": "off",
    },
    ("model", "lora", "init_lora_weights"): {True: "default", "true": "default"},
}


def own_value(alias: KeyPath, value: object) -> object:
    """Convert the value of an alias, which may be true or false where our key has names.

    transformers' gradient_checkpointing is a switch, and peft's init_lora_weights true is the
    default.
    """
    names = _SWITCHES.get(alias, {})
    return names.get(value, value) if isinstance(value, bool | str) else value


def with_aliases(schema: dict[str, Any]) -> dict[str, object]:
    """Add every alias to the JSON schema of a configuration, next to its key."""
    for alias, key in OWN_PATHS.items():
        properties = schema["properties"]
        for part in key[:-1]:
            reference = properties[part]["$ref"].rpartition("/")[2]
            properties = schema["$defs"][reference]["properties"]
        entry = dict(properties[key[-1]]) | {
            "description": f"another name of {'.'.join(map(str, key))}"
        }
        if alias in _SWITCHES:
            given = {name: entry.pop(name) for name in ("enum", "type") if name in entry}
            entry["anyOf"] = [*entry.get("anyOf", [given]), {"type": "boolean"}]
        properties[alias[-1]] = entry
    return schema
