"""YAML and overrides -> `RunConfig`, with the origin of every value. All faults are found before any is reported.

Order: the defaults, the file, then what was typed on the command line. Keys are checked against the schema first, so
that an unknown one is answered with the right one; values next, by pydantic, whose errors are said in our own words;
what cannot go together last.
"""

import codecs
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fitune.config.aliases import OWN_PATHS, own_value
from fitune.config.importers.names import NAMES_OF_OTHER_TOOLS, hint_for_name
from fitune.config.schema import RunConfig
from fitune.config.sections import DataSource, Section
from fitune.config.wording import describe_fault, shown
from fitune.config.yaml_lines import KeyPath, Position, parse_scalar, parse_yaml
from fitune.errors import ConfigError

COMMAND_LINE = "command line"
PYTHON = "Python"
MAX_FILE_BYTES = 1_000_000
DATA_SUFFIXES = (".jsonl", ".parquet", ".csv")
"""Not .json: a configuration may be written in JSON."""
DATA_WAY = "if it is the data, give it with --data (data.train)"
_MAIN_KEYS = {
    "model": "source",
    "data": "train",
    "optim": "name",
    "batch": "effective",
    "memory": "budget",
    "run": "name",
}
_MAIN_KEYS |= {
    "train": "epochs",
    "eval": "max_rows",
    "lora": "rank",
    "shape": "preset",
    "columns": "prompt",
}
_FLAGS = {"model.source": "--model", "data.train": "--data"}


@dataclass(frozen=True)
class ResolvedConfig:
    """origins: every key of the schema, dotted -> 'default', 'sft.yaml:12', 'command line' or 'Python'."""

    config: RunConfig
    origins: Mapping[str, str]


def read_config(
    source: Path | str | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> ResolvedConfig:
    """A YAML file (or a mapping, or nothing) and `key.sub=value` on top of it -> the checked configuration.

    Values of overrides are YAML scalars, or lists in brackets: `optim.lr=5e-7`, `data.train=[a.jsonl,b.jsonl]`.
    Raises ConfigError with every fault found, one sentence each.
    """
    draft = _draft(source)
    _rename_aliases(draft)
    for override in overrides:
        _apply_override(draft, override)
    _remove_unknown_keys(draft, draft.tree, RunConfig, ())
    config = _validate(draft)
    if draft.faults or config is None:
        raise ConfigError(sorted(dict.fromkeys(draft.faults), key=_line_number))
    origins = {_dotted(path): draft.origin(path) or "default" for path in _leaves(RunConfig)}
    return ResolvedConfig(config, MappingProxyType(origins))


def _line_number(fault: str) -> int:
    match = re.match(r"\S+:(\d+): ", fault)
    return int(match[1]) if match else 0


@dataclass
class _Draft:
    """What was written so far: the tree, where each value stands, and the faults found in it."""

    tree: dict[str, Any]
    marks: dict[KeyPath, Position]
    name: str | None = None
    faults: list[str] = field(default_factory=list)
    lost_sections: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> str | None:
        """Where the value at `path` stands; for a part of a value, where the value does."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                part = _get(self.tree, path[:length])
                return (
                    self.marks[path[:length]].origin
                    if length == len(path) or not isinstance(part, dict)
                    else None
                )
        return None

    def fault(self, path: KeyPath, sentence: str) -> None:
        origin = self.origin(path) or self.name
        self.faults.append(f"{origin}: {sentence}" if origin and origin != PYTHON else sentence)


def _draft(source: Path | str | Mapping[str, Any] | None) -> _Draft:
    if source is None:
        return _Draft({}, {})
    if isinstance(source, Mapping):
        tree = _plain(source)
        return _Draft(tree, {path: Position(PYTHON) for path in _paths(tree)})
    path = Path(source)
    marked = parse_yaml(_read_text(path), str(path))
    if not isinstance(marked.tree, dict):
        what = "is empty" if marked.tree is None else f"holds {shown(marked.tree)}"
        needed = "it needs at least model.source and data.train"
        if isinstance(marked.tree, list) and path.suffix == ".json":
            needed = DATA_WAY
        sentence = f"{path} {what}, not the keys of a configuration: {needed}"
        raise ConfigError([*marked.faults, sentence])
    return _Draft(marked.tree, dict(marked.marks), str(path), list(marked.faults))


def check_is_configuration(path: Path) -> None:
    """Raises ConfigError for what is taken for one: data, by its name, and directories."""
    if path.is_dir():
        own = path / "config.yaml"
        if not (own.is_file() and (path / "checkpoints").is_dir()):
            raise ConfigError([f"{path} is a directory, not a configuration file"])
        goes_on = f"'fitune train --resume {path}' goes on with it"
        raise ConfigError(
            [f"{path} is the directory of a run: {goes_on}, and {own} is its configuration"]
        )
    if path.suffix in DATA_SUFFIXES and path.is_file():
        raise ConfigError(
            [f"{path} is data by its name, not a configuration: give it with --data (data.train)"]
        )


def decode(content: bytes) -> str:
    """UTF-8, or UTF-16 where the mark at its start says so, as editors on Windows write it. Lines end in a newline."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return (
        content.decode("utf-16" if is_utf_16 else "utf-8-sig")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )


def read_bounded(path: Path) -> bytes:
    """A configuration of ours or another tool's; a device may give more than any memory holds. Raises ConfigError for
    more than MAX_FILE_BYTES, and OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            [
                f"{path} has over {MAX_FILE_BYTES:,} bytes, too many for a configuration: is it the data? "
                "That is data.train"
            ]
        )
    return content


def _read_text(path: Path) -> str:
    check_is_configuration(path)
    try:
        return decode(read_bounded(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            [
                f"{path} is not a text file: byte {error.start} is not UTF-8; save it in that encoding"
            ]
        ) from error
    except FileNotFoundError as error:
        twin = path.with_suffix({".yml": ".yaml", ".yaml": ".yml"}.get(path.suffix, ".yaml"))
        answer = f"did you mean {twin}?" if twin.is_file() else "give the path of a YAML file"
        raise ConfigError([f"{path} does not exist: {answer}"]) from error
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error


def _rename_aliases(draft: _Draft) -> None:
    """What is written with another name of a key becomes the value of the key; both beside each other are a fault."""
    for alias, path in OWN_PATHS.items():
        section = _get(draft.tree, alias[:-1])
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
    return f"{_dotted(path)} and {_dotted(alias)} are two names of one key: keep one"


def _apply_override(draft: _Draft, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    path: KeyPath = tuple(
        int(part) if part.isdecimal() and len(part) < 10 else part for part in key.split(".")
    )
    alias, path = path, OWN_PATHS.get(path, path)
    text = str(own_value(alias, text.strip()))
    if not equals or not all(isinstance(part, int) or part.isidentifier() for part in path):
        sentence = f"'{override}' is not an override: write it like optim.lr=2e-5"
    elif path in draft.marks and draft.marks[path].origin == COMMAND_LINE:
        sentence = f"'{key}' is given twice: keep one" if alias == path else _two_names(alias, path)
    elif (schema := _schema_at(path)) is None:
        sentence = f"unknown key '{key}'{_suggestion(str(path[-1]))}"
    elif isinstance(schema, type) and not text.strip().startswith("{"):
        sentence = _section_sentence(path)
    elif isinstance(schema, type):
        try:
            section = parse_yaml(text.strip(), COMMAND_LINE).tree
        except ConfigError as error:
            sentence = f"'{key}' cannot be set: {error}"
        else:
            assert isinstance(section, dict)
            for name, value in section.items():
                _apply_override(draft, f"{key}.{name}={json.dumps(value)}")
            return
    else:
        try:
            _set(draft, path, text.strip())
            return
        except ValueError as error:
            sentence = f"'{key}' cannot be set: {error}"
    draft.faults.append(f"{COMMAND_LINE}: {sentence}")


def _set(draft: _Draft, path: KeyPath, text: str) -> None:
    """Raises ValueError, in words, where there is no place for the value."""
    value, mark = parse_scalar(text), Position(COMMAND_LINE, text)
    if text.startswith(("[", "{", '"', "'")):
        try:
            value, mark = parse_yaml(text, COMMAND_LINE).tree, Position(COMMAND_LINE)
        except ConfigError as error:
            raise ValueError(
                f"'{text}' is not a value of YAML: {str(error).rpartition(': ')[2]}"
            ) from error
    holder: Any = draft.tree
    for depth, part in enumerate(path[:-1], start=1):
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
        holder = _get(holder, (part,))
        if not isinstance(holder, dict | list) or (
            depth == len(path) - 1 and isinstance(holder, list)
        ):
            raise ValueError(
                f"{_dotted(path[:depth])} is {shown(holder)}, which has no '{path[depth]}'"
            )
    holder[path[-1]] = value
    for below in [other for other in draft.marks if other[: len(path)] == path]:
        del draft.marks[below]
    draft.marks[path] = mark


def _remove_unknown_keys(draft: _Draft, tree: Any, model: type[Section], path: KeyPath) -> None:
    for key in list(tree):
        here: KeyPath = (*path, key)
        if key not in model.model_fields:
            draft.fault(here, f"unknown key '{_dotted(here)}'{_suggestion(str(key))}")
            del tree[key]
            continue
        schema, value = _schema_at(here), tree[key]
        if isinstance(schema, type):
            if value is None:
                tree[key] = {}
            elif not isinstance(value, dict):
                draft.fault(here, _section_sentence(here))
                draft.lost_sections.add(here)
                del tree[key]
            else:
                _remove_unknown_keys(draft, value, schema, here)
        elif path == ("data",) and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _remove_unknown_keys(draft, item, DataSource, (*here, index))


def _suggestion(name: str) -> str:
    """': did you mean ...', or what the name is called here if it is another tool's or stands in another section."""
    known = {path[-1]: _dotted(path) for path in reversed(list(_leaves(RunConfig)))}
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


def _section_sentence(path: KeyPath) -> str:
    key = _dotted(path)
    return f"'{key}' is a section of keys, not a value: did you mean '{key}.{_MAIN_KEYS[str(path[-1])]}'?"


def _validate(draft: _Draft) -> RunConfig | None:
    for section in ("model", "data"):  # they hold required keys: those are missing, not the section
        draft.tree.setdefault(section, {})
    try:
        return RunConfig.model_validate(draft.tree)
    except ValidationError as error:
        errors = error.errors()
    if _take_letters(draft, errors):
        return _validate(draft)
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in errors:
        by_key.setdefault(_key_of(detail["loc"]), []).append(detail)
    for path, details in by_key.items():
        if path[:-1] in draft.lost_sections:
            continue
        if any(other[: len(path)] == path and len(other) > len(path) for other in by_key if path):
            continue  # a part of this value is at fault: the other branches of the union say nothing
        for where, sentence in _sentences(draft, path, details):
            draft.fault(where, sentence)
    return None


def _take_letters(draft: _Draft, errors: list[ErrorDetails]) -> bool:
    """Give keys that want text the letters of a bare scalar that reads as something else: `name: 007`."""
    taken = False
    for detail in errors:
        path = _key_of(detail["loc"])
        mark = draft.marks.get(path)
        if (
            detail["type"] == "string_type"
            and mark
            and mark.text
            and isinstance(detail["input"], int | float)
        ):
            _get(draft.tree, path[:-1])[path[-1]] = mark.text
            taken = True
    return taken


def _sentences(
    draft: _Draft, path: KeyPath, details: list[ErrorDetails]
) -> Iterator[tuple[KeyPath, str]]:
    """Where each fault stands, and its sentence."""
    key, value = _dotted(path), _get(draft.tree, path)
    if ours := [
        str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"
    ]:
        if isinstance(_schema_at(path), type):  # values that cannot go together name their keys
            yield from (
                (_first_named_key(draft, line), line) for text in ours for line in text.splitlines()
            )
        else:
            yield path, f"{key}: {ours[0]}"
    elif value is None and any(detail["type"] == "missing" for detail in details):
        flag = f" or with {_FLAGS[key]}" if key in _FLAGS else ""
        yield path, f"{key} is missing: give it in the configuration{flag}"
    else:
        wanted = describe_fault(_schema_at(path))
        choices = wanted.replace(",", "").split() if isinstance(value, str) else []
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.7)
        yield (
            path,
            f"{key} is {shown(value)}: it must be {wanted}"
            + (f"; did you mean {close[0]}?" if close else ""),
        )


def _key_of(location: tuple[int | str, ...]) -> KeyPath:
    """pydantic's location, which names branches of unions too -> the path of the key at fault."""
    path: KeyPath = ()
    model: type[Section] | None = RunConfig
    index: int | None = None
    for part in location:
        if model is not None and part in model.model_fields:
            path = (*path, part) if index is None else (*path, index, part)
            schema = _schema_at(path)
            model, index = (schema, None) if isinstance(schema, type) else (None, None)
        elif isinstance(part, int) and path[:1] == ("data",):
            model, index = DataSource, part
    return path


def _schema_at(path: KeyPath) -> type[Section] | Mapping[str, Any] | None:
    """A section's class, a key's JSON schema, or None where the schema has no such key."""
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
            item: Mapping[str, Any] | None = _properties(DataSource).get(str(path[depth + 2]))
            return item if len(path) == depth + 3 else None
        else:
            return None
    return model


@cache
def _properties(model: type[Section]) -> Mapping[str, Any]:
    properties: Mapping[str, Any] = model.model_json_schema()["properties"]
    return properties


def _leaves(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _leaves(info.annotation, (*path, name))
        else:
            yield (*path, name)


def _first_named_key(draft: _Draft, sentence: str) -> KeyPath:
    """A fault of several keys stands where the first of them does that was given."""
    named = [path for path in _leaves(RunConfig) if _dotted(path) in sentence]
    return next((path for path in named if draft.origin(path)), ())


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _get(tree: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _plain(value: Any) -> Any:
    """Mappings and sequences as dict and list, so that a caller's objects are never changed."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _paths(tree: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, item in items:
        yield from _paths(item, (*path, key))
