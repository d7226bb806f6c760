"""Reads a sweep: several configurations in one file, under the key `sweep`.

The key holds a list with one entry per run, a grid of which every combination is run, or a search
by Optuna:

    sweep: [{batch.micro: 6, batch.accumulation: 1}, {batch.micro: 4, optim.lr: 6e-5}]
    sweep: {optim.lr: [3e-5, 6e-5], batch.micro: [4, 6]}
    sweep: {search: {optim.lr: {low: 1e-5, high: 1e-3, log: true}}, trials: 12}

All runs share the seed, the order of the data and the held-out samples, unless the sweep sets such
a key itself. A sweep is a directory of runs. Its sweep.json stores the state of each run, so that
the same command continues where it stopped.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fitune.boundary import parse_json
from fitune.config import RunConfig, read_config
from fitune.config.text_files import check_is_configuration
from fitune.config.yaml_lines import parse_yaml
from fitune.errors import ConfigError, RunDirectoryError
from fitune.plain_files import read_plain
from fitune.run.files import write_atomically, write_json

SWEEP_FILE = "sweep.json"
MOST_RUNS = 200


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of a sweep."""

    name: str
    #: what the sweep sets for this run
    overrides: Mapping[str, object]
    config: RunConfig


@dataclass(frozen=True, slots=True)
class Search:
    """A search by Optuna."""

    #: key -> a list of choices, or {low, high, log, step}
    space: Mapping[str, Any]
    #: how many runs in all
    trials: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Several runs from one file: either the entries of a list or grid, or a search."""

    #: where the runs are
    directory: Path
    #: the configuration without the key `sweep`
    tree: Mapping[str, Any]
    #: overrides from the command line
    typed: tuple[str, ...]
    entries: tuple[Entry, ...]
    search: Search | None = None


def read_sweep(path: Path, typed: Sequence[str] = ()) -> Sweep:
    """Read a sweep.

    typed: overrides like `key.sub=value`, for all runs.

    Raises ConfigError with every fault of every run.
    """
    check_is_configuration(path)
    try:
        marked = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if marked.faults:
        raise ConfigError(list(marked.faults))
    tree = dict(marked.tree) if isinstance(marked.tree, dict) else {}
    wanted = tree.pop("sweep", None)
    if not isinstance(wanted, list | dict) or not wanted:
        raise ConfigError(
            [f"{path} has no key 'sweep': give a list of runs, or a grid of keys and their values"]
        )
    base = read_config(tree, typed).config
    directory = base.run.output / (base.run.name or path.stem)
    if isinstance(wanted, dict) and "search" in wanted:
        return Sweep(directory, tree, tuple(typed), (), _read_search(path, wanted))
    settings = _grid(path, wanted) if isinstance(wanted, dict) else wanted
    if len(settings) > MOST_RUNS:
        raise ConfigError(
            [f"{path}: this sweep has {len(settings):,} runs; at most {MOST_RUNS} are done in one"]
        )
    entries, faults = [], []
    for number, overrides in enumerate(settings, start=1):
        if not isinstance(overrides, dict):
            faults.append(
                f"{path}: run {number} of the sweep is no set of keys: write it like {{optim.lr: 3e-5}}"
            )
            continue
        try:
            entries.append(make_entry(directory, tree, overrides, typed=typed))
        except ConfigError as error:
            faults += [f"run {number} of the sweep: {fault}" for fault in error.faults]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    faults += [
        f"{path}: two runs of the sweep are called {name}: give one a run.name" for name in twice
    ]
    if faults:
        raise ConfigError(faults)
    return Sweep(directory, tree, tuple(typed), tuple(entries))


def make_entry(
    directory: Path,
    tree: Mapping[str, object],
    overrides: Mapping[str, object],
    *,
    name: str | None = None,
    typed: Sequence[str] = (),
) -> Entry:
    """Make a run of the sweep. Raises ConfigError."""
    overrides = dict(overrides)
    chosen = name or str(overrides.pop("run.name", "") or _name(overrides))
    assignments = [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()
    ]
    given = {assignment.partition("=")[0] for assignment in assignments} | {
        "run.output",
        "run.name",
    }
    remaining = [assignment for assignment in typed if assignment.partition("=")[0] not in given]
    config = read_config(
        tree, [*remaining, *assignments, f"run.output={directory}", f"run.name={chosen}"]
    ).config
    return Entry(chosen, overrides, config)


def write_entry(directory: Path, entry: Entry) -> Path:
    """Write the entry's configuration to a file for `fitune train`."""
    path = directory / "configs" / f"{entry.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = entry.config.model_dump(mode="json", exclude_defaults=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def read_states(directory: Path) -> dict[str, dict[str, Any]]:
    """Return name -> {state, plan, message} in the sweep's order; empty if it has not begun.

    Raises RunDirectoryError if the file is damaged.
    """
    path = directory / SWEEP_FILE
    if not path.exists():
        return {}
    try:
        return {str(each["name"]): dict(each) for each in parse_json(read_plain(path))["runs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged: {error}; remove it to begin the sweep again"
        ) from error


def write_states(directory: Path, states: Mapping[str, Mapping[str, object]]) -> None:
    runs = [{"name": name, **state} for name, state in states.items()]
    write_json(directory / SWEEP_FILE, {"schema": 1, "runs": runs})


def _grid(path: Path, wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    faults = [
        f"{path}: sweep.{key} must be a list of values: write it like [3e-5, 6e-5]"
        for key, values in wanted.items()
        if not isinstance(values, list) or not values
    ]
    if faults:
        raise ConfigError(faults)
    return [
        dict(zip(wanted, values, strict=True)) for values in itertools.product(*wanted.values())
    ]


def _read_search(path: Path, wanted: Mapping[str, Any]) -> Search:
    space, trials = wanted["search"], wanted.get("trials", 20)
    unknown = sorted(wanted.keys() - {"search", "trials"})
    faults = [
        f"{path}: sweep.{key} is unknown beside 'search': only 'trials' stands there"
        for key in unknown
    ]
    if not isinstance(space, dict) or not space:
        faults.append(
            f"{path}: sweep.search must hold keys with [choices] or {{low: .., high: ..}}"
        )
        space = {}
    if not isinstance(trials, int) or not 0 < trials <= MOST_RUNS:
        faults.append(
            f"{path}: sweep.trials is {trials}: it must be a whole number from 1 to {MOST_RUNS}"
        )
    for key, values in space.items():
        in_range = isinstance(values, dict) and {"low", "high"} <= values.keys() <= {
            "low",
            "high",
            "log",
            "step",
        }
        if not in_range and not (isinstance(values, list) and values):
            faults.append(
                f"{path}: sweep.search.{key} must be a list of choices, or {{low: .., high: .., log: true}}"
            )
    if faults:
        raise ConfigError(faults)
    return Search(space, trials)


def _name(overrides: Mapping[str, object]) -> str:
    """Make a name from the overrides.

    Example: {'batch.micro': 6, 'batch.accumulation': 4, 'optim.lr': 6e-5} -> '6x4-lr6e-05'.
    """
    rest = dict(overrides)
    parts = []
    if {"batch.micro", "batch.accumulation"} <= rest.keys():
        parts.append(f"{rest.pop('batch.micro')}x{rest.pop('batch.accumulation')}")
    parts += [f"{key.rpartition('.')[2]}{value}" for key, value in rest.items()]
    name = "".join(
        character if character.isalnum() or character in "-._" else "_"
        for character in "-".join(parts)
    )
    return name.strip(".")[:80] or "run"
