"""Read YAML and overrides into a `RunConfig`, with the origin of every value.

The file overrides the defaults and the command line overrides the file. All errors are collected
before any is reported. Keys are checked against the schema first, so that an unknown key is
answered with the right one. pydantic then checks the values, and its errors are rephrased. Keys
that exclude each other are checked last.
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
from fitune.config.wording import describe_fault, format_value
from fitune.config.yaml_lines import KeyPath, Position, parse_scalar, parse_yaml
from fitune.errors import ConfigError

COMMAND_LINE = "command line"
PYTHON = "Python"
MAX_FILE_BYTES = 1_000_000
#: Suffixes that no configuration has. A configuration may be written in JSON, so .json is missing.
DATA_SUFFIXES = (".jsonl", ".parquet", ".csv")
DATA_WAY = "if it is the data, give it with --data (data.train)"
_MAIN_KEYS = {
    "model": "source", "data": "train", "optim": "name", "batch": "effective", "memory": "budget",
    "run": "name", "train": "epochs", "eval": "max_rows", "lora": "rank", "shape": "preset",
    "columns": "prompt",
}  # fmt: skip
_LENGTHS = (("train", "epochs"), ("train", "steps"), ("train", "tokens"))
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
    draft = _start_draft(source)
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
    """Holds a configuration while it is read, and the errors found in it so far."""

    tree: dict[str, Any]
    #: Path of a value -> where it was written.
    marks: dict[KeyPath, Position]
    #: The file that it is read from.
    name: str | None = None
    faults: list[str] = field(default_factory=list)
    #: Sections whose value was removed because it was not a mapping.
    lost_sections: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> str | None:
        """Return where the value at `path` was written, or where the list that contains it was."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                part = _get(self.tree, path[:length])
                return (
                    self.marks[path[:length]].origin
                    if length == len(path) or not isinstance(part, dict)
                    else None
                )
        return None

    def fault(self, path: KeyPath, message: str) -> None:
        origin = self.origin(path) or self.name
        self.faults.append(f"{origin}: {message}" if origin and origin != PYTHON else message)


def _start_draft(source: Path | str | Mapping[str, Any] | None) -> _Draft:
    if source is None:
        return _Draft({}, {})
    if isinstance(source, Mapping):
        tree = _plain(source)
        return _Draft(tree, {path: Position(PYTHON) for path in _paths(tree)})
    path = Path(source)
    marked = parse_yaml(_read_text(path), str(path))
    if not isinstance(marked.tree, dict):
        what = "is empty" if marked.tree is None else f"holds {format_value(marked.tree)}"
        needed = "it needs at least model.source and data.train"
        if isinstance(marked.tree, list) and path.suffix == ".json":
            needed = DATA_WAY
        message = f"{path} {what}, not the keys of a configuration: {needed}"
        raise ConfigError([*marked.faults, message])
    return _Draft(marked.tree, dict(marked.marks), str(path), list(marked.faults))


def check_is_configuration(path: Path) -> None:
    """Raise ConfigError if the path is a directory or has the suffix of a data file."""
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
    """Decode UTF-8, or UTF-16 if it starts with a byte order mark, as editors on Windows write it.

    Normalises the ends of lines to newlines.
    """
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return (
        content.decode("utf-16" if is_utf_16 else "utf-8-sig")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )


def read_bounded(path: Path) -> bytes:
    """Read a configuration file of fitune or of another tool.

    The size is limited because a device file may never end. Raises ConfigError if the file is
    larger than MAX_FILE_BYTES, and OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            [
                f"{path} has over {MAX_FILE_BYTES:,} bytes, too many for a configuration: is it "
                "the data? "
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
    """Move the value of each alias to its key, and report an error if both are set."""
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
        message = f"'{override}' is not an override: write it like optim.lr=2e-5"
    elif path in draft.marks and draft.marks[path].origin == COMMAND_LINE:
        message = f"'{key}' is given twice: keep one" if alias == path else _two_names(alias, path)
    elif (schema := _schema_at(path)) is None:
        message = f"unknown key '{key}'{_suggestion(str(path[-1]))}"
    elif isinstance(schema, type) and not text.strip().startswith("{"):
        message = _section_message(path)
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
            _set(draft, path, text.strip())
            _drop_other_lengths(draft, path)
            return
        except ValueError as error:
            message = f"'{key}' cannot be set: {error}"
    draft.faults.append(f"{COMMAND_LINE}: {message}")


def _drop_other_lengths(draft: _Draft, path: KeyPath) -> None:
    """Let a length on the command line replace the file's, which is in another unit."""
    if path not in _LENGTHS or _get(draft.tree, path) is None:
        return
    for other in _LENGTHS:
        mark = draft.marks.get(other)
        if mark is not None and mark.origin != COMMAND_LINE:
            del draft.tree[other[0]][other[1]], draft.marks[other]


def _set(draft: _Draft, path: KeyPath, text: str) -> None:
    """Set a value in the tree. Raises ValueError with a message if its parent is no section."""
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
                f"{_dotted(path[:depth])} is {format_value(holder)}, which has no '{path[depth]}'"
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
                draft.fault(here, _section_message(here))
                draft.lost_sections.add(here)
                del tree[key]
            else:
                _remove_unknown_keys(draft, value, schema, here)
        elif path == ("data",) and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _remove_unknown_keys(draft, item, DataSource, (*here, index))


def _suggestion(name: str) -> str:
    """Return the end of the message about an unknown key, such as ": did you mean 'optim.lr'?".

    Looks for the name in other sections and in other tools, then for similar names.
    """
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


def _section_message(path: KeyPath) -> str:
    key = _dotted(path)
    return f"'{key}' is a section of keys, not a value: did you mean '{key}.{_MAIN_KEYS[str(path[-1])]}'?"


def _validate(draft: _Draft) -> RunConfig | None:
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
        by_key.setdefault(_key_of(detail["loc"]), []).append(detail)
    for path, details in by_key.items():
        if path[:-1] in draft.lost_sections:
            continue
        if any(other[: len(path)] == path and len(other) > len(path) for other in by_key if path):
            # The error is in an item of this value; errors of the other union types are noise.
            continue
        for where, message in _messages(draft, path, details):
            draft.fault(where, message)
    return None


def _restore_text(draft: _Draft, errors: list[ErrorDetails]) -> bool:
    """Replace a number by the text that it was read from where a key needs text: `name: 007`.

    Returns whether any value was replaced.
    """
    is_changed = False
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
            is_changed = True
    return is_changed


def _messages(
    draft: _Draft, path: KeyPath, details: list[ErrorDetails]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path, message) for the errors of the value at `path`."""
    key, value = _dotted(path), _get(draft.tree, path)
    if ours := [
        str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"
    ]:
        # Messages about keys that exclude each other already name the keys.
        if isinstance(_schema_at(path), type):
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
            f"{key} is {format_value(value)}: it must be {wanted}"
            + (f"; did you mean {close[0]}?" if close else ""),
        )


def _key_of(location: tuple[int | str, ...]) -> KeyPath:
    """Convert a location of pydantic, which includes types of unions, to the path of the key."""
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


def _schema_at(path: KeyPath) -> type[Section] | Mapping[str, object] | None:
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


def _leaves(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _leaves(info.annotation, (*path, name))
        else:
            yield (*path, name)


def _first_named_key(draft: _Draft, message: str) -> KeyPath:
    """Return the first key that the message names and the user has set, or ()."""
    named = [path for path in _leaves(RunConfig) if _dotted(path) in message]
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


def _plain(value: object) -> Any:
    """Copy mappings and sequences to dicts and lists, so that the caller's stay unchanged."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _paths(tree: object, path: KeyPath = ()) -> Iterator[KeyPath]:
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
