"""What an import has written so far, and which of the other tool's arguments it has used or named.

No argument vanishes: `Draft.rest` finds those that neither the text nor a sentence names, and says why of each.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fitune.config.importers.read import ToolArguments
from fitune.config.importers.reasons import ANSWERS, NOT_NEEDED, OTHER_TRAINING, PREFERENCE_OF_TRL
from fitune.config.wording import shown
from fitune.config.yaml_lines import parse_scalar
from fitune.errors import ConfigError

# What is computed with, and so is checked first; what is only passed on, our own schema checks.
_NUMBERS = frozenset(
    (
        *(
            "batch.micro",
            "batch.accumulation",
            "batch.effective",
            "optim.lr",
            "optim.warmup",
            "train.steps",
        ),
        *(
            "train.epochs",
            "data.eval_fraction",
            "data.max_rows",
            "model.lora.rank",
            "model.lora.alpha",
        ),
        *(
            "optim.final_lr_fraction",
            "min_lr",
            "min_lr_rate",
            "warmup_steps",
            "hidden_size",
            "num_hidden_layers",
        ),
        *("use_moe", "quantization_bit", "quant_bits"),
    )
)
_WORDS = frozenset(("optim.schedule", "optim.name", "model.source", "run.output", "data.too_long"))
_MAPPINGS = frozenset(("peft_config", "lr_scheduler_kwargs", "quant_config"))

# What other values would change and these do not; the last two are how transformers writes an empty one.
_AS_HERE = {"truncation_mode": "keep_start", "eos_token": "<EOS_TOKEN>", "pad_token": "<PAD_TOKEN>"}
_EVERY = "train.eval_every and train.save_every: ten in a run where they are not set"
_WHEN = dict.fromkeys(
    ("eval_steps", "save_steps", "eval_strategy", "save_strategy", "evaluation_strategy"), _EVERY
)


def checked(arguments: ToolArguments) -> ToolArguments:
    """With mappings of arguments taken apart and numbers in quotes as numbers. Raises ConfigError for values of the
    wrong kind and, of all at once, for those that ask for another training."""
    values: dict[str, Any] = {}
    origins, faults = {}, []
    for holder, held in arguments.values.items():
        for name, value in _taken_apart(holder, held).items():
            names = {name, arguments.table.keys.get(name, "")}
            is_number = bool(names & _NUMBERS)
            values[name] = parse_scalar(value) if is_number and isinstance(value, str) else value
            origins[name] = arguments.origins[holder]
            is_word = bool(names & _WORDS) or (
                "model.method" in names and not isinstance(value, bool)
            )
            if is_number and not isinstance(values[name], int | float) and not is_off(value):
                faults.append(f"{origins[name]} {name}: {shown(value)}: a number is needed here")
            elif is_word and not isinstance(value, str):
                faults.append(f"{origins[name]} {name}: {shown(value)}: a word is needed here")
            elif is_other_training(name, value):
                faults.append(f"{origins[name]} {name}: {shown(value)}: {OTHER_TRAINING[name][1]}")
            elif name in PREFERENCE_OF_TRL and arguments.tool == "TRL" and not is_off(value):
                faults.append(
                    f"{origins[name]} {name}: {shown(value)}: fitune is for supervised fine-tuning alone"
                )
    if faults:
        raise ConfigError(faults)
    return replace(arguments, values=values, origins=origins)


def is_other_training(name: str, value: Any) -> bool:
    return name in OTHER_TRAINING and not is_off(value) and value not in OTHER_TRAINING[name][0]


def is_off(value: Any) -> bool:
    return value in (False, 0, "", "none", "no", "null", "false", "False", "None") or value in (
        [],
        {},
        [""],
    )


def _taken_apart(name: str, value: Any) -> dict[str, Any]:
    if name not in _MAPPINGS:
        return {name: value}
    if isinstance(value, str):  # as a command gives it
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, dict):
        return {name: value}
    # a plugin of LLaMA-Factory v1 is chosen by its name
    return {
        f"{name}.name" if key == "name" else key: part
        for key, part in value.items()
        if part is not None
    }


@dataclass
class Draft:
    """written: our key -> (value, comment). differs: what means something else here, one sentence each. used: arguments
    that were read; shown: those that a comment or a sentence names. reasons: why one has no effect here."""

    arguments: ToolArguments
    devices: int
    written: dict[str, tuple[Any, str]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    given_elsewhere: dict[str, Any] = field(default_factory=dict)
    columns: list[tuple[dict[str, str], str]] = field(default_factory=list)
    """Of each source of training rows: our name of a column -> theirs, and where that is said."""

    @property
    def tool(self) -> str:
        return self.arguments.tool

    @property
    def method(self) -> str:
        return str(self.written["model.method"][0])

    def override(self, key: str, value: Any) -> None:
        for name in self.names(key):
            self.reasons[name] = "another was given with the import"
        self.given_elsewhere[key] = value

    def names(self, key: str) -> list[str]:
        """What the arguments call our key, where they give it."""
        return [
            name for name in self.arguments.values if self.arguments.table.keys.get(name) == key
        ]

    def name(self, key: str) -> str | None:
        return next(iter(self.names(key)), None)

    def raw(self, name: str, default: Any = None) -> Any:
        """An argument by its own name."""
        self.used.add(name)
        return self.arguments.values.get(name, default)

    def take(self, key: str) -> Any:
        """An argument by our key: as given, else the tool's default, else None."""
        if key in self.given_elsewhere:
            return self.given_elsewhere[key]
        if (name := self.name(key)) is not None:
            return self.raw(name)
        return self.default(key)

    def default(self, key: str) -> Any:
        found = self.arguments.table.defaults.get(key)
        if found is None:
            return None
        return found.value[self.method] if isinstance(found.value, dict) else found.value

    def put(self, key: str, value: Any, comment: str | None = None) -> None:
        name = self.name(key)
        if key in self.given_elsewhere:
            comment = "command line"
        elif comment is None and name is None:
            found = self.arguments.table.defaults.get(key)
            comment = f"default of {found.source if found else self.tool}"
        elif comment is None:
            assert name is not None
            comment = (
                self.said(name)
                if self.arguments.values[name] != value
                else f"{self.origin(name)} {name}"
            )
        self.written[key] = (value, comment)

    def keep(self, key: str, kind: type | None = None) -> None:
        if (value := self.take(key)) is not None:
            self.put(key, kind(value) if kind else value)

    def origin(self, name: str) -> str:
        self.shown.add(name)
        return self.arguments.origins[name]

    def said(self, name: str) -> str:
        return f"{self.origin(name)} {name}: {shown(self.arguments.values[name])}"

    def refuse(self, name: str, sentence: str) -> ConfigError:
        return ConfigError([f"{self.said(name)}: {sentence}"])

    def located(self, fault: str) -> str:
        """A fault of our configuration, with where its key's value comes from."""
        key = fault.split()[0].rstrip(":")
        return f"{fault} ({self.written[key][1]})" if key in self.written else fault

    def rest(self) -> tuple[list[str], dict[str, str]]:
        """What is not named yet: sentences for what makes a difference, and for what makes none the reason by name."""
        dropped, not_needed = [], {}
        for name, value in self.arguments.values.items():
            if name in self.shown:
                continue
            if reason := self.reasons.get(name, NOT_NEEDED.get(name)):
                not_needed[name] = reason
            elif is_off(value):
                not_needed[name] = "it is switched off"
            elif name in _WHEN:
                not_needed[name] = _WHEN[name]
            elif name in self.used or name in OTHER_TRAINING or _AS_HERE.get(name) == value:
                not_needed[name] = "it is what is done here, or has no effect beside the others"
            else:
                answer = ANSWERS.get(name, "fitune has nothing like it")
                dropped.append(f"{self.said(name)}: {answer}")
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
    value = draft.take(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    name = draft.name(key)
    assert name is not None
    raise draft.refuse(name, "a number above 0 is needed here")


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
