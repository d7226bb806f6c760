"""Describe in English which values a key accepts, from its JSON schema, and which value it got."""

from collections.abc import Mapping
from typing import Any


def describe_fault(schema: Mapping[str, Any] | type | None) -> str:
    """Return what values a JSON schema accepts, joining the types of a union with 'or'.

    For {'type': 'integer', 'exclusiveMinimum': 0}: 'a whole number above 0'.
    """
    assert isinstance(schema, Mapping)
    branches = schema.get("anyOf", [schema])
    words = [_describe_type(branch) for branch in branches]
    choices = [
        word
        for branch, word in zip(branches, words, strict=True)
        if "const" in branch or "enum" in branch
    ]
    rest = [word for word in words if word not in choices]
    if not choices:
        return " or ".join(rest)
    listed = [choice for word in choices for choice in word.split(", ")]
    return " or ".join([*rest, *([", ".join(listed[:-1])] if len(listed) > 1 else []), listed[-1]])


def format_value(value: object) -> str:
    """Format a value as a user would write it, and shorten a long one."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe_type(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(str(choice) for choice in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        prefix = schema.get("prefixItems")
        if choices := schema.get("items", {}).get("enum"):
            return f"a list of words, each {', '.join(choices[:-1])} or {choices[-1]}"
        return f"a list of {len(prefix)} numbers below 1" if prefix else "a list"
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number{_limits(schema)}"
    if kind == "string" and schema.get("minLength"):
        return "text that is not empty"
    return {"boolean": "true or false", "null": "null", "string": "text"}[str(kind)]


def _limits(schema: Mapping[str, Any]) -> str:
    limits = [("minimum", "of at least"), ("exclusiveMinimum", "above"), ("maximum", "of at most")]
    limits.append(("exclusiveMaximum", "below"))
    parts = [f"{words} {_number(schema[name])}" for name, words in limits if name in schema]
    return f" {' and '.join(parts)}" if parts else ""


def _number(limit: float) -> str:
    return f"{limit:,.0f}" if limit >= 1000 else f"{limit:g}"
