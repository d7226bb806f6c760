"""Writes the commands and the YAML that stand for the settings of the page."""

import shlex
from collections.abc import Iterator, Mapping

import yaml

from fitune.config import read_config
from fitune.planning.limits import NO_DATA

#: configuration key -> the flag of the command line for it
_FLAGS = {
    "model.source": "--model",
    "data.train": "--data",
    "data.max_length": "--max-length",
    "batch.effective": "--batch",
    "batch.micro": "--micro",
    "optim.lr": "--lr",
    "train.epochs": "--epochs",
    "train.steps": "--steps",
    "run.output": "--output",
    "run.name": "--name",
}
#: what has no effect on a run
_PLAN_ALONE = ("memory.gpu", "memory.routing")


def settings_text(settings: Mapping[str, str]) -> tuple[str, ...]:
    """Return the settings as `read_config` takes them; without data, those of a model alone."""
    return tuple(f"{key}={value}" for key, value in {"data.train": NO_DATA, **settings}.items())


def plan_command(settings: Mapping[str, str]) -> str:
    """Return the `fitune plan` that gives the plan of these settings."""
    others = dict(settings)
    words = ["fitune", "plan"]
    if _is_plain(others["model.source"]):
        words.append(others.pop("model.source"))
    for key, flag in (("memory.gpu", "--gpu"), ("memory.budget", "--memory-limit")):
        if key in others:
            words += [flag, others.pop(key)]
    return shlex.join([*words, *_words(others)])


def train_arguments(settings: Mapping[str, str]) -> list[str]:
    """Return the arguments of the `fitune train` that trains with these settings."""
    others = {key: value for key, value in settings.items() if key not in _PLAN_ALONE}
    return ["train", *_words(others)]


def train_command(settings: Mapping[str, str]) -> str:
    return shlex.join(["fitune", *train_arguments(settings)])


def settings_yaml(settings: Mapping[str, str]) -> str:
    """Return the settings as a configuration file. Raises ConfigError if they are wrong."""
    config = read_config(None, settings_text(settings)).config
    tree = config.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _is_plain(source: str) -> bool:
    """Return whether a model may stand as a word of its own, which is not taken for another."""
    return (
        "=" not in source and not source.startswith("-") and not source.endswith((".yaml", ".yml"))
    )


def _words(settings: Mapping[str, str]) -> Iterator[str]:
    for key, value in settings.items():
        # a value that looks like a flag would be taken for one
        if key in _FLAGS and not value.startswith(("-", "[")):
            yield from (_FLAGS[key], value)
        else:
            yield f"{key}={value}"
