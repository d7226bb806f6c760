"""Parse YAML into a tree of plain values and the line of each value.

Scalars follow the core schema of YAML 1.2. PyYAML follows YAML 1.1, where `5e-7` is text, `off` is
false, `1:30` is 90 and `010` is 8. Anchors work. Duplicate keys are an error, as YAML demands;
PyYAML silently takes the last one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from fitune.errors import ConfigError

Tree: TypeAlias = bool | int | float | str | list["Tree"] | dict[str, "Tree"] | None
KeyPath: TypeAlias = tuple[str | int, ...]

MAX_VALUES = 10_000
_DEEP = re.compile(r"(?:[\[{]\s*){200}")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9](_?[0-9]){0,99}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def dotted(path: KeyPath) -> str:
    """Write the path as a user does, such as 'optim.lr'."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class Position:
    """Holds where a value was written, and its text."""

    #: Such as 'sft.yaml:12' or 'command line'.
    origin: str
    #: The text of a scalar without quotes; None for other values. A key that needs text uses it, so
    #: that `name: 007` needs no quotes.
    text: str | None = None


@dataclass(frozen=True)
class MarkedTree:
    tree: Tree
    marks: Mapping[KeyPath, Position]
    faults: tuple[str, ...] = ()


def parse_yaml(text: str, source: str) -> MarkedTree:
    """Parse the first document of `text`. source: its name in the origins of the values.

    Raises ConfigError if the text is not YAML. Duplicate keys are returned in `faults` instead, so
    that they are reported together with all other errors.
    """
    # PyYAML takes time quadratic in the depth of nested brackets before it gives up.
    if _DEEP.search(text):
        raise ConfigError([f"{source}: this is nested too deeply for a configuration"])
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if "unknown escape character" in problem:
            problem += "; a path with \\ stands without quotes, or in single ones"
        raise ConfigError([f"{where}: this is not valid YAML: {problem}"]) from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            [f"{source}: not a text file: character {error.position} is not printable"]
        ) from error
    except RecursionError as error:
        raise ConfigError([f"{source}: this is nested too deeply for a configuration"]) from error
    reading = _Reading(source)
    return MarkedTree(
        None if node is None else reading.value(node, ()), reading.marks, tuple(reading.faults)
    )


def parse_scalar(text: str) -> Tree:
    """Parse a scalar without quotes: '5e-7' is 5e-07, 'off' is 'off' and '' is None."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


@dataclass
class _Reading:
    source: str
    marks: dict[KeyPath, Position] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    open_nodes: list[yaml.Node] = field(default_factory=list)

    def value(self, node: yaml.Node, path: KeyPath) -> Tree:
        self.marks.setdefault(path, Position(self._where(node)))
        # A few anchors that refer to each other can expand to more values than memory holds.
        if len(self.marks) > MAX_VALUES:
            raise ConfigError(
                [f"{self.source}: more than {MAX_VALUES:,} values are too many for a configuration"]
            )
        if isinstance(node, yaml.ScalarNode):
            if not node.tag.startswith("tag:yaml.org,2002:"):
                self.faults.append(
                    f"{self._where(node)}: tags such as {node.tag} are not read: write the value itself"
                )
            if node.style is not None:
                return str(node.value)
            self.marks[path] = Position(self.marks[path].origin, node.value)
            return parse_scalar(node.value)
        if any(node is above for above in self.open_nodes):
            self.faults.append(f"{self._where(node)}: this anchor contains itself")
            return None
        self.open_nodes.append(node)
        tree = (
            self._mapping(node, path)
            if isinstance(node, yaml.MappingNode)
            else self._sequence(node, path)
        )
        self.open_nodes.pop()
        return tree

    def _sequence(self, node: yaml.Node, path: KeyPath) -> Tree:
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, path: KeyPath) -> Tree:
        tree: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(
                    f"{self._where(key_node)}: a key must be a word, not a list or a mapping"
                )
                continue
            key = str(key_node.value)
            if key in tree:
                first = self.marks[(*path, key)].origin
                dotted = ".".join(str(part) for part in (*path, key))
                self.faults.append(
                    f"{self._where(key_node)}: '{dotted}' is given twice, first at {first}: keep one"
                )
                continue
            self.marks[(*path, key)] = Position(self._where(key_node))
            tree[key] = self.value(value_node, (*path, key))
        return tree

    def _where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"
