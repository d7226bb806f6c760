"""Accept the names that transformers, peft and trl use as aliases of our keys.

Our keys stay valid. `fitune config schema` and the documentation list the aliases too.
"""

from collections.abc import Mapping
from typing import Any

from fitune.config.yaml_lines import KeyPath

#: Alias -> our key, in the same section.
ALIASES: Mapping[str, str] = {
    "model.gradient_checkpointing": "model.recompute",
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
_CHECKPOINTING = {True: "full", False: "off", "true": "full", "false": "off"}


def own_value(alias: KeyPath, value: object) -> object:
    """Convert the value of an alias: transformers' gradient_checkpointing is true or false."""
    is_switch = alias == ("model", "gradient_checkpointing") and isinstance(value, bool | str)
    return _CHECKPOINTING.get(value, value) if is_switch else value


def with_aliases(schema: dict[str, Any]) -> dict[str, object]:
    """Add every alias to the JSON schema of a configuration, next to its key."""
    for alias, key in OWN_PATHS.items():
        reference = schema["properties"][key[0]]["$ref"].rpartition("/")[2]
        properties = schema["$defs"][reference]["properties"]
        entry = dict(properties[key[1]]) | {
            "description": f"another name of {'.'.join(map(str, key))}"
        }
        if alias == ("model", "gradient_checkpointing"):
            entry["anyOf"] = [*entry["anyOf"], {"type": "boolean"}]
        properties[alias[1]] = entry
    return schema
