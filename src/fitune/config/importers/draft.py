"""Collect the translated configuration, and track which of the other tool's arguments it covers.

No argument is lost: `Draft.unmentioned` finds those that neither the YAML nor a message names, and
gives a reason for each.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fitune.config.importers.read import ToolArguments
from fitune.config.importers.reasons import (
    ANSWERS,
    NOT_NEEDED,
    OTHER_TRAINING,
    PREFERENCE_OF_TRL,
    READ_OF_PREFERENCES,
)
from fitune.config.importers.tools import Default
from fitune.config.wording import format_value
from fitune.config.yaml_lines import parse_scalar
from fitune.errors import ConfigError

# The import computes with these values, so their types are checked first. The schema checks values
# that are only passed on.
_NUMERIC_KEYS = frozenset(
    (
        *("batch.micro", "batch.accumulation", "batch.effective", "optim.lr", "optim.warmup"),
        *("optim.final_lr_fraction", "train.steps", "train.epochs", "data.eval_fraction"),
        *("data.max_rows", "model.lora.rank", "model.lora.alpha", "min_lr", "min_lr_rate"),
        *("warmup_steps", "hidden_size", "num_hidden_layers", "use_moe", "quantization_bit"),
        "quant_bits",
    )
)
_TEXT_KEYS = frozenset(
    ("optim.schedule", "optim.name", "model.source", "run.output", "data.too_long")
)
_MAPPINGS = frozenset(("peft_config", "lr_scheduler_kwargs", "quant_config"))

# Values that equal what fitune does. transformers writes the last two for unset arguments.
_SAME_AS_HERE = {
    "truncation_mode": "keep_start",
    "eos_token": "<EOS_TOKEN>",
    "pad_token": "<PAD_TOKEN>",
}
_INTERVAL_REASON = "train.eval_every and train.save_every: ten in a run, at least five steps apart, where they are not set"
_INTERVAL_REASONS = dict.fromkeys(
    ("eval_steps", "save_steps", "eval_strategy", "save_strategy", "evaluation_strategy"),
    _INTERVAL_REASON,
)


def check_arguments(arguments: ToolArguments) -> ToolArguments:
    """Return the arguments with nested mappings flattened and quoted numbers as numbers.

    Raises ConfigError, for all arguments at once, if a value has the wrong type or requests
    something other than supervised fine-tuning.
    """
    values: dict[str, object] = {}
    origins, faults = {}, []
    kind = preference_kind(arguments)
    for holder, held in arguments.values.items():
        for name, value in _expand_mapping(holder, held).items():
            names = {name, arguments.table.keys.get(name, "")}
            is_number = bool(names & _NUMERIC_KEYS)
            values[name] = parse_scalar(value) if is_number and isinstance(value, str) else value
            origins[name] = arguments.origins[holder]
            is_text = bool(names & _TEXT_KEYS) or (
                "model.method" in names and not isinstance(value, bool)
            )
            if is_number and not isinstance(values[name], int | float) and not is_off(value):
                faults.append(
                    f"{origins[name]} {name}: {format_value(value)}: a number is needed here"
                )
            elif is_text and not isinstance(value, str):
                faults.append(
                    f"{origins[name]} {name}: {format_value(value)}: a word is needed here"
                )
            elif kind is not None and name in READ_OF_PREFERENCES:
                continue
            elif is_other_training(name, value):
                faults.append(
                    f"{origins[name]} {name}: {format_value(value)}: {OTHER_TRAINING[name][1]}"
                )
            elif name in PREFERENCE_OF_TRL and arguments.tool == "TRL" and not is_off(value):
                faults.append(
                    f"{origins[name]} {name}: {format_value(value)}: "
                    "only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported"
                )
    if faults:
        raise ConfigError(faults)
    return replace(arguments, values=values, origins=origins)


#: what a tool's selector of another training than supervised fine-tuning -> its names of those
#: that are imported
_SELECTORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LLaMA-Factory": ("stage", ("dpo", "kto")),
    "axolotl": ("rl", ("dpo", "ipo", "orpo", "simpo", "kto")),
    "ms-swift": ("rlhf_type", ("dpo", "orpo", "simpo", "kto")),
}


def preference_kind(arguments: ToolArguments) -> str | None:
    """Return the tool's name for the training on preferences that is imported, None if it is none."""
    if arguments.tool == "TRL":
        return arguments.training or None
    name, known = _SELECTORS.get(arguments.tool, ("", ()))
    chosen = arguments.values.get(name, "dpo" if arguments.training == "rlhf" else None)
    return chosen if isinstance(chosen, str) and chosen in known else None


def is_other_training(name: str, value: object) -> bool:
    return name in OTHER_TRAINING and not is_off(value) and value not in OTHER_TRAINING[name][0]


def is_off(value: object) -> bool:
    return value in (False, 0, "", "none", "no", "null", "false", "False", "None") or value in (
        [],
        {},
        [""],
    )


def _expand_mapping(name: str, value: object) -> dict[str, object]:
    if name not in _MAPPINGS:
        return {name: value}
    if isinstance(value, str):  # a command line passes a mapping as JSON
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, dict):
        return {name: value}
    # LLaMA-Factory v1 selects a plugin by the key `name`.
    return {
        f"{name}.name" if key == "name" else key: part
        for key, part in value.items()
        if part is not None
    }


@dataclass
class Draft:
    """Holds a configuration that is being translated from another tool's arguments."""

    arguments: ToolArguments
    #: Number of devices that trained together.
    devices: int
    #: Our key -> (value, comment with its origin).
    written: dict[str, tuple[Any, str]] = field(default_factory=dict)
    #: Messages about arguments that mean something else in fitune.
    differs: list[str] = field(default_factory=list)
    #: Names of the arguments that the translation has read.
    used: set[str] = field(default_factory=set)
    #: Names of the arguments that a comment or a message names.
    mentioned: set[str] = field(default_factory=set)
    #: Name of an argument -> why it has no effect in fitune.
    reasons: dict[str, str] = field(default_factory=dict)
    #: Our key -> the value that the user gave with the import.
    given_elsewhere: dict[str, object] = field(default_factory=dict)
    #: For each source of training data: {our name of a column: its name}, and where that is stated.
    columns: list[tuple[dict[str, str], str]] = field(default_factory=list)
    #: Our key -> a default of the tool for this training that differs from its table.
    own_defaults: dict[str, Default] = field(default_factory=dict)
    #: The formats that axolotl's sources name as their type.
    types: set[str] = field(default_factory=set)

    @property
    def tool(self) -> str:
        return self.arguments.tool

    @property
    def method(self) -> str:
        return str(self.written["model.method"][0])

    def override(self, key: str, value: object) -> None:
        for name in self.names(key):
            self.reasons[name] = "another was given with the import"
        self.given_elsewhere[key] = value

    def names(self, key: str) -> list[str]:
        """Return the names of the given arguments that correspond to our key."""
        return [
            name for name in self.arguments.values if self.arguments.table.keys.get(name) == key
        ]

    def name(self, key: str) -> str | None:
        return next(iter(self.names(key)), None)

    def argument(self, name: str, default: object = None) -> Any:
        """Return an argument by the other tool's name, and mark it as used."""
        self.used.add(name)
        return self.arguments.values.get(name, default)

    def value(self, key: str) -> Any:
        """Return an argument by our key: as given, else the tool's default, else None."""
        if key in self.given_elsewhere:
            return self.given_elsewhere[key]
        if (name := self.name(key)) is not None:
            return self.argument(name)
        return self.default(key)

    def default(self, key: str) -> Any:
        found = self.own_defaults.get(key) or self.arguments.table.defaults.get(key)
        if found is None:
            return None
        return found.value[self.method] if isinstance(found.value, dict) else found.value

    def write(self, key: str, value: object, comment: str | None = None) -> None:
        """Set our key. The comment is by default the argument or the default that it comes from."""
        name = self.name(key)
        if key in self.given_elsewhere:
            comment = "command line"
        elif comment is None and name is None:
            found = self.own_defaults.get(key) or self.arguments.table.defaults.get(key)
            comment = f"default of {found.source if found else self.tool}"
        elif comment is None:
            assert name is not None
            comment = (
                self.quoted(name)
                if self.arguments.values[name] != value
                else f"{self.origin(name)} {name}"
            )
        self.written[key] = (value, comment)

    def copy(self, key: str, kind: type | None = None) -> None:
        if (value := self.value(key)) is not None:
            self.write(key, kind(value) if kind else value)

    def origin(self, name: str) -> str:
        self.mentioned.add(name)
        return self.arguments.origins[name]

    def quoted(self, name: str) -> str:
        return f"{self.origin(name)} {name}: {format_value(self.arguments.values[name])}"

    def refuse(self, name: str, message: str) -> ConfigError:
        return ConfigError([f"{self.quoted(name)}: {message}"])

    def located(self, fault: str) -> str:
        """Return a schema error with the origin of the value of its key."""
        key = fault.split()[0].rstrip(":")
        return f"{fault} ({self.written[key][1]})" if key in self.written else fault

    def unmentioned(self) -> tuple[list[str], dict[str, str]]:
        """Return what became of the arguments that no comment and no message names.

        Returns messages for the arguments that are dropped, and {name: reason} for those that
        are not needed.
        """
        dropped, not_needed = [], {}
        for name, value in self.arguments.values.items():
            if name in self.mentioned:
                continue
            if reason := self.reasons.get(name, NOT_NEEDED.get(name)):
                not_needed[name] = reason
            elif is_off(value):
                not_needed[name] = "it is switched off"
            elif name in _INTERVAL_REASONS:
                not_needed[name] = _INTERVAL_REASONS[name]
            elif name in self.used or name in OTHER_TRAINING or _SAME_AS_HERE.get(name) == value:
                not_needed[name] = "it is what is done here, or has no effect beside the others"
            else:
                answer = ANSWERS.get(name, "fitune has nothing like it")
                dropped.append(f"{self.quoted(name)}: {answer}")
        return dropped, not_needed

    def tree(self, keys: Iterable[str]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key in keys:
            *sections, name = key.split(".")
            holder = tree
            for part in sections:
                holder = holder.setdefault(part, {})
            holder[name] = self.written[key][0]
        return tree


def whole(draft: Draft, key: str) -> int:
    value = draft.value(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    name = draft.name(key)
    assert name is not None
    raise draft.refuse(name, "a number above 0 is needed here")


def without(values: Mapping[str, object], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
