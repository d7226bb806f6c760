"""Read YAML and overrides into a `RunConfig`, with the origin of every value.

The file overrides the defaults and the command line overrides the file. All errors are collected
before any is reported. Keys are checked against the schema first, so that an unknown key is
answered with the right one. pydantic then checks the values, and its errors are rephrased. Keys
that exclude each other are checked last.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fitune.config.aliases import OWN_PATHS, own_value
from fitune.config.draft import (
    COMMAND_LINE,
    Draft,
    drop_other_lengths,
    set_value,
    start_draft,
    value_under,
)
from fitune.config.keys import key_of, leaves, schema_at, section_message, suggestion
from fitune.config.schema import RunConfig
from fitune.config.sections import DataSource
from fitune.config.trained_parts import Section
from fitune.config.wording import describe_fault, format_value
from fitune.config.yaml_lines import KeyPath, dotted, parse_yaml
from fitune.errors import ConfigError

_FLAGS = {"model.source": "--model", "data.train": "--data"}


@dataclass(frozen=True)
class ResolvedConfig:
    """Holds a checked configuration and the origin of each of its values."""

    config: RunConfig
    #: Every dotted key -> 'default', 'sft.yaml:12', 'command line' or 'Python'.
    origins: Mapping[str, str]


def read_config(
    source: Path | str | Mapping[str, object] | None, overrides: Sequence[str] = ()
) -> ResolvedConfig:
    """Read and check a configuration.

    source: a YAML file, a mapping, or None for the defaults alone.
    overrides: texts such as `optim.lr=5e-7` or `data.train=[a.jsonl,b.jsonl]`; a value is a YAML
        scalar, or a list in brackets.

    Raises ConfigError with a message for each error.
    """
    draft = start_draft(source)
    _rename_aliases(draft)
    for override in overrides:
        _apply_override(draft, override)
    _remove_unknown_keys(draft, draft.tree, RunConfig, ())
    config = _validate(draft)
    if draft.faults or config is None:
        raise ConfigError(sorted(dict.fromkeys(draft.faults), key=_line_number))
    origins = {dotted(path): draft.origin(path) or "default" for path in leaves(RunConfig)}
    return ResolvedConfig(config, MappingProxyType(origins))


def _line_number(fault: str) -> int:
    match = re.match(r"\S+:(\d+): ", fault)
    return int(match[1]) if match else 0


def _rename_aliases(draft: Draft) -> None:
    """Move the value of each alias to its key, and report an error if both are set."""
    for alias, path in OWN_PATHS.items():
        section = value_under(draft.tree, alias[:-1])
        if not isinstance(section, dict) or alias[-1] not in section:
            continue
        if path[-1] in section:
            draft.fault(alias, _two_names(alias, path))
            del section[alias[-1]]
            continue
        section[path[-1]] = own_value(alias, section.pop(alias[-1]))
        for below in [mark for mark in draft.marks if mark[: len(alias)] == alias]:
            draft.marks[(*path, *below[len(alias) :])] = draft.marks.pop(below)


def _two_names(alias: KeyPath, path: KeyPath) -> str:
    return f"{dotted(path)} and {dotted(alias)} are two names of one key: keep one"


def _apply_override(draft: Draft, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    path: KeyPath = tuple(
        int(part) if part.isdecimal() and len(part) < 10 else part for part in key.split(".")
    )
    alias, path = path, OWN_PATHS.get(path, path)
    text = str(own_value(alias, text.strip()))
    if not equals or not all(isinstance(part, int) or part.isidentifier() for part in path):
        message = f"'{override}' is not an override: write it like optim.lr=2e-5"
    elif path in draft.marks and draft.marks[path].origin == COMMAND_LINE:
        message = f"'{key}' is given twice: keep one" if alias == path else _two_names(alias, path)
    elif (schema := schema_at(path)) is None:
        message = f"unknown key '{key}'{suggestion(str(path[-1]))}"
    elif isinstance(schema, type) and not text.strip().startswith("{"):
        message = section_message(path)
    elif isinstance(schema, type):
        try:
            section = parse_yaml(text.strip(), COMMAND_LINE).tree
        except ConfigError as error:
            message = f"'{key}' cannot be set: {error}"
        else:
            assert isinstance(section, dict)
            for name, value in section.items():
                _apply_override(draft, f"{key}.{name}={json.dumps(value)}")
            return
    else:
        try:
            set_value(draft, path, text.strip())
            drop_other_lengths(draft, path)
            return
        except ValueError as error:
            message = f"'{key}' cannot be set: {error}"
    draft.faults.append(f"{COMMAND_LINE}: {message}")


def _remove_unknown_keys(draft: Draft, tree: Any, model: type[Section], path: KeyPath) -> None:
    for key in list(tree):
        here: KeyPath = (*path, key)
        if key not in model.model_fields:
            draft.fault(here, f"unknown key '{dotted(here)}'{suggestion(str(key))}")
            del tree[key]
            continue
        schema, value = schema_at(here), tree[key]
        if isinstance(schema, type):
            if value is None:
                tree[key] = {}
            elif not isinstance(value, dict):
                draft.fault(here, section_message(here))
                draft.lost_sections.add(here)
                del tree[key]
            else:
                _remove_unknown_keys(draft, value, schema, here)
        elif path == ("data",) and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _remove_unknown_keys(draft, item, DataSource, (*here, index))


def _validate(draft: Draft) -> RunConfig | None:
    # These sections have required keys. Errors should name a missing key, not the missing section.
    for section in ("model", "data"):
        draft.tree.setdefault(section, {})
    try:
        return RunConfig.model_validate(draft.tree)
    except ValidationError as error:
        errors = error.errors()
    if _restore_text(draft, errors):
        return _validate(draft)
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in errors:
        by_key.setdefault(key_of(detail["loc"]), []).append(detail)
    for path, details in by_key.items():
        if path[:-1] in draft.lost_sections:
            continue
        if any(other[: len(path)] == path and len(other) > len(path) for other in by_key if path):
            # The error is in an item of this value; errors of the other union types are noise.
            continue
        for where, message in _messages(draft, path, details):
            draft.fault(where, message)
    return None


def _restore_text(draft: Draft, errors: list[ErrorDetails]) -> bool:
    """Replace a number by the text that it was read from where a key needs text: `name: 007`.

    Returns whether any value was replaced.
    """
    is_changed = False
    for detail in errors:
        path = key_of(detail["loc"])
        mark = draft.marks.get(path)
        if (
            detail["type"] == "string_type"
            and mark
            and mark.text
            and isinstance(detail["input"], int | float)
        ):
            value_under(draft.tree, path[:-1])[path[-1]] = mark.text
            is_changed = True
    return is_changed


def _messages(
    draft: Draft, path: KeyPath, details: list[ErrorDetails]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path, message) for the errors of the value at `path`."""
    key, value = dotted(path), value_under(draft.tree, path)
    if ours := [
        str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"
    ]:
        # Messages about keys that exclude each other already name the keys.
        if isinstance(schema_at(path), type):
            yield from (
                (_first_named_key(draft, line), line) for text in ours for line in text.splitlines()
            )
        else:
            yield path, f"{key}: {ours[0]}"
    elif value is None and any(detail["type"] == "missing" for detail in details):
        flag = f" or with {_FLAGS[key]}" if key in _FLAGS else ""
        yield path, f"{key} is missing: give it in the configuration{flag}"
    else:
        wanted = describe_fault(schema_at(path))
        choices = wanted.replace(",", "").split() if isinstance(value, str) else []
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.7)
        yield (
            path,
            f"{key} is {format_value(value)}: it must be {wanted}"
            + (f"; did you mean {close[0]}?" if close else ""),
        )


def _first_named_key(draft: Draft, message: str) -> KeyPath:
    """Return the first key that the message names and the user has set, or ()."""
    named = [path for path in leaves(RunConfig) if dotted(path) in message]
    return next((path for path in named if draft.origin(path)), ())
