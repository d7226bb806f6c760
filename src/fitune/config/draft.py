"""A configuration while it is read: its values, where each was written, the errors so far."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitune.config.text_files import DATA_WAY, read_text
from fitune.config.wording import format_value
from fitune.config.yaml_lines import KeyPath, Position, dotted, parse_scalar, parse_yaml
from fitune.errors import ConfigError

COMMAND_LINE = "command line"
PYTHON = "Python"
_LENGTHS = (("train", "epochs"), ("train", "steps"), ("train", "tokens"))


@dataclass
class Draft:
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
                part = value_under(self.tree, path[:length])
                return (
                    self.marks[path[:length]].origin
                    if length == len(path) or not isinstance(part, dict)
                    else None
                )
        return None

    def fault(self, path: KeyPath, message: str) -> None:
        origin = self.origin(path) or self.name
        self.faults.append(f"{origin}: {message}" if origin and origin != PYTHON else message)


def start_draft(source: Path | str | Mapping[str, Any] | None) -> Draft:
    """Parse the file or copy the mapping. Raises ConfigError if it holds no keys."""
    if source is None:
        return Draft({}, {})
    if isinstance(source, Mapping):
        tree = _plain(source)
        return Draft(tree, {path: Position(PYTHON) for path in _paths(tree)})
    path = Path(source)
    marked = parse_yaml(read_text(path), str(path))
    if not isinstance(marked.tree, dict):
        what = "is empty" if marked.tree is None else f"holds {format_value(marked.tree)}"
        needed = "it needs at least model.source and data.train"
        if isinstance(marked.tree, list) and path.suffix == ".json":
            needed = DATA_WAY
        message = f"{path} {what}, not the keys of a configuration: {needed}"
        raise ConfigError([*marked.faults, message])
    return Draft(marked.tree, dict(marked.marks), str(path), list(marked.faults))


def drop_other_lengths(draft: Draft, path: KeyPath) -> None:
    """Let a length on the command line replace the file's, which is in another unit."""
    if path not in _LENGTHS or value_under(draft.tree, path) is None:
        return
    for other in _LENGTHS:
        mark = draft.marks.get(other)
        if mark is not None and mark.origin != COMMAND_LINE:
            del draft.tree[other[0]][other[1]], draft.marks[other]


def set_value(draft: Draft, path: KeyPath, text: str) -> None:
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
        holder = value_under(holder, (part,))
        if not isinstance(holder, dict | list) or (
            depth == len(path) - 1 and isinstance(holder, list)
        ):
            raise ValueError(
                f"{dotted(path[:depth])} is {format_value(holder)}, which has no '{path[depth]}'"
            )
    holder[path[-1]] = value
    for below in [other for other in draft.marks if other[: len(path)] == path]:
        del draft.marks[below]
    draft.marks[path] = mark


def value_under(tree: Any, path: KeyPath) -> Any:
    """Return the value at this path of nested dicts and lists, or None."""
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
