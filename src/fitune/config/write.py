"""Write a `RunConfig` as YAML with the origin of each value; compute its hash and JSON schema."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from fitune.config.aliases import with_aliases
from fitune.config.read import ResolvedConfig
from fitune.config.schema import RunConfig
from fitune.config.yaml_lines import parse_scalar


def format_config(resolved: ResolvedConfig) -> str:
    """Format every key, including defaults, as YAML with its origin as a comment.

    `read_config` reads the same RunConfig from it.
    """
    return commented_yaml(resolved.config.model_dump(mode="json"), resolved.origins)


def commented_yaml(tree: Mapping[str, object], comments: Mapping[str, str]) -> str:
    """Format a tree of sections as YAML. comments: dotted key of a value -> its comment."""
    return "\n".join(_lines(tree, comments, "")) + "\n"


def config_hash(config: RunConfig) -> str:
    """Return 16 hexadecimal digits that are equal for configurations that train the same.

    Hashes all sections but `run`, which only says where the result is written.
    """
    text = json.dumps(config.model_dump(mode="json", exclude={"run"}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_schema() -> dict[str, object]:
    """Return the JSON schema (draft 2020-12) of the configuration file, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | with_aliases(RunConfig.model_json_schema()) | {"title": "fitune configuration"}


def _lines(tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in origins:
            yield f"{indent}{f'{name}: {_flow(value)}':<{48 - len(indent)}}  # {origins[key]}"
        else:
            yield f"{indent}{name}:"
            yield from _lines(value, origins, f"{key}.")


def _flow(value: object) -> str:
    """Format a value as JSON, which is also YAML, without quotes around text that needs none.

    A YAML 1.1 parser reads the same value.
    """
    if (
        isinstance(value, str)
        and re.fullmatch(r"[\w./~-]+", value)
        and yaml.safe_load(value) == value
    ):
        return value if parse_scalar(value) == value else json.dumps(value)
    if isinstance(value, float):
        return re.sub(r"^(\d+)e", r"\1.0e", repr(value))
    if isinstance(value, list):
        value = [
            {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
            for item in value
        ]
    return json.dumps(value, ensure_ascii=False)
