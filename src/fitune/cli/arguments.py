"""Read `CONFIG [key.sub=value ...]` and the flags for common keys, which several verbs share."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from fitune.config import ResolvedConfig, read_config
from fitune.errors import ConfigError, RunDirectoryError

ConfigArguments = Annotated[
    str,
    Parameter(
        name="CONFIG",
        help="A YAML file, then any number of key.sub=value that replace its values: "
        "sft.yaml optim.lr=2e-5. Without a file, --model and --data are needed.",
    ),
]


CONFIGURATION = Group("Configuration", sort_key=1)


def _flag(key: str, kind: str, text: str) -> Parameter:
    """Return the parameter for a configuration key. kind: the placeholder of its value in help."""
    return Parameter(help=f"{text} ({key})", metavar=kind, group=CONFIGURATION)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConfigFlags:
    """Holds the flags for common keys as text, which `read_config` parses and checks."""

    model: Annotated[
        str | None, _flag("model.source", "MODEL", "preset, directory, hub id or file")
    ] = None
    data: Annotated[
        tuple[str, ...], _flag("data.train", "PATH", "training data; may be given several times")
    ] = ()
    max_length: Annotated[
        str | None, _flag("data.max_length", "TOKENS", "the longest sample; longer ones are cut")
    ] = None
    batch: Annotated[
        str | None,
        _flag("batch.effective", "SAMPLES", "effective batch: samples of an optimizer step"),
    ] = None
    micro: Annotated[
        str | None,
        _flag("batch.micro", "SAMPLES", "micro-batch size: samples in one forward and backward"),
    ] = None
    lr: Annotated[str | None, _flag("optim.lr", "FLOAT", "learning rate")] = None
    epochs: Annotated[str | None, _flag("train.epochs", "FLOAT", "passes over the data")] = None
    steps: Annotated[str | None, _flag("train.steps", "INT", "optimizer steps")] = None
    seed: Annotated[str | None, _flag("train.seed", "INT", "of all random numbers")] = None
    output: Annotated[str | None, _flag("run.output", "PATH", "where runs are kept")] = None
    name: Annotated[str | None, _flag("run.name", "NAME", "the run's directory below output")] = (
        None
    )


_KEYS = {
    "model": "model.source",
    "data": "data.train",
    "max_length": "data.max_length",
    "batch": "batch.effective",
    "micro": "batch.micro",
    "lr": "optim.lr",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "seed": "train.seed",
    "output": "run.output",
    "name": "run.name",
}


def read_arguments(
    words: tuple[str, ...],
    flags: ConfigFlags,
    *,
    overrides: Sequence[str] = (),
    source: Path | None = None,
) -> ResolvedConfig:
    """Read the configuration that a command line describes.

    words: an optional file, then overrides such as `optim.lr=2e-5`.
    overrides: additional overrides from the verb's own flags.
    source: the configuration of an existing run, instead of a file among the words.

    Raises ConfigError with every error of the file and of the command line.
    """
    own, overrides = overrides, list(words)
    is_file = bool(words) and ("=" not in words[0] or Path(words[0]).exists())
    if source is not None and is_file:
        raise ConfigError(
            [f"{words[0]}: the run has its configuration; give what changes as key.sub=value"]
        )
    if is_file:
        source = Path(overrides.pop(0))
    if source is None and not words and flags == ConfigFlags():
        raise ConfigError(["nothing to work on: give a configuration file, or --model and --data"])
    return read_config(source, [*overrides, *_overrides(flags), *own])


def _overrides(flags: ConfigFlags) -> Iterator[str]:
    for field in fields(flags):
        value = getattr(flags, field.name)
        if isinstance(value, tuple) and value:
            yield f"{_KEYS[field.name]}={json.dumps(value if len(value) > 1 else value[0])}"
        elif value is not None and value != ():
            yield f"{_KEYS[field.name]}={value}"


#: Default of run.output.
RUNS = Path("runs")


def run_path(run: Path, output: Path = RUNS) -> Path:
    """Return `run` if it exists, else the directory of that name in `output`.

    Raises RunDirectoryError if neither exists.
    """
    if run.exists():
        return run
    if (output / run).exists():
        return output / run
    raise RunDirectoryError(
        f"there is no run {run}, neither as a directory nor as a name in {output}: 'fitune runs' lists them"
    )
