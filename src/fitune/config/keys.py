"""The keys that a configuration may have, and what is said about one that it may not."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from fitune.config.importers.names import NAMES_OF_OTHER_TOOLS, hint_for_name
from fitune.config.schema import RunConfig
from fitune.config.sections import DataSource
from fitune.config.trained_parts import Section
from fitune.config.yaml_lines import KeyPath, dotted

_MAIN_KEYS = {
    "model": "source", "data": "train", "optim": "name", "batch": "effective", "memory": "budget",
    "run": "name", "train": "epochs", "eval": "max_rows", "lora": "rank", "shape": "preset",
    "columns": "prompt", "freeze": "trained_layers",
}  # fmt: skip


def suggestion(name: str) -> str:
    """Return the end of the message about an unknown key, such as ": did you mean 'optim.lr'?".

    Looks for the name in other sections and in other tools, then for similar names.
    """
    known = {path[-1]: dotted(path) for path in reversed(list(leaves(RunConfig)))}
    if name == "sweep":
        return ": several runs in one file are for 'fitune sweep'"
    if name in known:
        return f": did you mean '{known[name]}'?"
    if hint := hint_for_name(name):
        return f": {hint}"
    close = difflib.get_close_matches(name, [*known, *NAMES_OF_OTHER_TOOLS], n=1, cutoff=0.75)
    if not close:
        return ": 'fitune config schema' lists the keys"
    return (
        f": did you mean '{known[close[0]]}'?"
        if close[0] in known
        else f": like '{close[0]}', {hint_for_name(close[0])}"
    )


def section_message(path: KeyPath) -> str:
    """Say that a section was given a value, and which of its keys was meant."""
    key = dotted(path)
    return f"'{key}' is a section of keys, not a value: did you mean '{key}.{_MAIN_KEYS[str(path[-1])]}'?"


def key_of(location: tuple[int | str, ...]) -> KeyPath:
    """Convert a location of pydantic, which includes types of unions, to the path of the key."""
    path: KeyPath = ()
    model: type[Section] | None = RunConfig
    index: int | None = None
    for part in location:
        if model is not None and part in model.model_fields:
            path = (*path, part) if index is None else (*path, index, part)
            schema = schema_at(path)
            model, index = (schema, None) if isinstance(schema, type) else (None, None)
        elif isinstance(part, int) and path[:1] == ("data",):
            model, index = DataSource, part
    return path


def schema_at(path: KeyPath) -> type[Section] | Mapping[str, object] | None:
    """Return the class of a section, the JSON schema of a key, or None for an unknown path."""
    model: type[Section] = RunConfig
    for depth, part in enumerate(path):
        if isinstance(part, int) or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            model = annotation
        elif depth == len(path) - 1:
            schema: Mapping[str, Any] = _properties(model)[part]
            return schema
        elif (
            path[:depth] == ("data",) and isinstance(path[depth + 1], int) and len(path) > depth + 2
        ):
            item: Mapping[str, object] | None = _properties(DataSource).get(str(path[depth + 2]))
            return item if len(path) == depth + 3 else None
        else:
            return None
    return model


@cache
def _properties(model: type[Section]) -> Mapping[str, Any]:
    properties: Mapping[str, object] = model.model_json_schema()["properties"]
    return properties


def leaves(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each key that holds a value."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from leaves(info.annotation, (*path, name))
        else:
            yield (*path, name)
