"""Implement `fitune sweep`, which trains several configurations in turn and compares them."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fitune.board.offline import write_page
from fitune.cli.arguments import ConfigArguments
from fitune.cli.compare import show_comparison
from fitune.cli.output import Format, console, print_aside, print_json, print_text, warn
from fitune.config import RunConfig, config_hash
from fitune.errors import ConfigError, DoesNotFitError, FituneError, InterruptedRunError, UsageError
from fitune.language import translated
from fitune.planning.plan import plan_json
from fitune.planning.search import choose_plan
from fitune.report.compare import Comparison, compare
from fitune.report.tables import comparison_json
from fitune.run.directory import RunDirectory, read_run
from fitune.run.files import write_json
from fitune.run.sweep import (
    Entry,
    Search,
    Sweep,
    make_entry,
    read_states,
    read_sweep,
    write_entry,
    write_states,
)
from fitune.units import format_bytes

States = dict[str, dict[str, Any]]


def sweep(
    *words: ConfigArguments,
    dry_run: Annotated[bool, Parameter(help="plan every run and stop")] = False,
    output_format: Format = "auto",
) -> None:
    """Train every configuration of the key `sweep`, each in its own process.

    All runs use the same data and held-out samples. They are planned first, so that a run that
    does not fit is reported before any run starts. A failed run does not end the sweep. The same
    command continues a sweep that was stopped. At the end the runs are compared and a report is
    written.
    """
    if not words:
        raise ConfigError(["nothing to sweep: give a configuration file with the key 'sweep'"])
    found = read_sweep(Path(words[0]), words[1:])
    found.directory.mkdir(parents=True, exist_ok=True)
    states = read_states(found.directory)
    if found.search is not None:
        if dry_run:
            raise UsageError(
                "a search chooses each run by those before it: there is nothing to plan ahead"
            )
        _search(found, found.search, states)
    else:
        entries = list(found.entries)
        _plan(found, entries, states)
        if dry_run:
            return
        for number, entry in enumerate(entries, start=1):
            _note(f"run {number} of {len(entries)}: {entry.name}")
            _run(found, entry, states)
    _finish(found, states, output_format)


def _plan(found: Sweep, entries: Sequence[Entry], states: States) -> None:
    """Plan the runs that are not planned yet, in one child process, and print what each needs."""
    for entry in entries:
        known = states.get(entry.name, {})
        if known.get("config_hash") != config_hash(entry.config):
            states[entry.name] = {
                "state": "waiting",
                "config_hash": config_hash(entry.config),
                "plan": None,
            }
    # Drop the runs that the sweep no longer contains.
    ordered = {entry.name: states[entry.name] for entry in entries}
    states.clear()
    states.update(ordered)
    names = [entry.name for entry in entries if states[entry.name]["plan"] is None]
    configs = {entry.name: entry.config for entry in entries}
    if names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            for name, plan in zip(
                names, pool.map(plan_content, [configs[name] for name in names]), strict=True
            ):
                states[name] |= plan
                write_states(found.directory, states)
    for entry in entries:
        _note(f"plan  {entry.name}: {_plan_text(states[entry.name])}")
    if all(states[entry.name]["state"] == "does not fit" for entry in entries):
        raise DoesNotFitError(
            f"no run of this sweep fits: {found.directory / 'sweep.json'} holds the plans"
        )


def plan_content(config: RunConfig) -> dict[str, object]:
    """Return {plan, state}, or {plan, plan_fault} if planning fails. The run is still tried then."""
    try:
        plan = choose_plan(config, search="fastest")
    # Any exception will do: a model that cannot be recorded can still be trained.
    except Exception as error:
        return {
            "plan": None,
            "plan_fault": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        }
    return {"plan": plan_json(plan)} | ({"state": "does not fit"} if plan.chosen is None else {})


def _plan_text(state: dict[str, Any]) -> str:
    plan = state["plan"]
    if plan is None:
        return f"not planned ({state.get('plan_fault', 'n/a')})"
    candidate = plan["candidates"][plan["chosen"] or 0]
    needed = format_bytes(candidate["predicted_device_bytes"])
    budget = format_bytes(plan["budget_bytes"])
    if state["state"] == "does not fit":
        return f"does not fit: it needs {needed} of {budget}; it is left out"
    return f"fits: {needed} of {budget}"


def _run(found: Sweep, entry: Entry, states: States) -> None:
    """Train one entry in a child process and record how it ended.

    Skips an entry that is finished or does not fit. Raises InterruptedRunError on Ctrl-C.
    """
    state = states[entry.name]
    run = RunDirectory(found.directory / entry.name)
    if state["state"] == "does not fit":
        return
    if _is_done(run, entry):
        _note(f"      {entry.name} is finished already")
        states[entry.name] |= {"state": "finished"}
        write_states(found.directory, states)
        return
    command = [sys.executable, "-m", "fitune", "train", *_arguments(found, entry, run)]
    # The child process must import this fitune, even if it is not installed.
    here = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    }
    with _ignore_interrupts():
        code = subprocess.run(
            command, stdout=subprocess.DEVNULL, env=environment, check=False
        ).returncode
    if code == 0 and state["plan"] is not None and not run.plan.exists():
        write_json(run.plan, state["plan"])
    states[entry.name] |= {"state": "finished" if code == 0 else "failed", "exit_code": code}
    write_states(found.directory, states)
    if code in (130, -signal.SIGINT):
        raise InterruptedRunError(f"interrupted in {entry.name}: the same command goes on with it")
    if code:
        warn(f"{entry.name} ended with exit code {code}; the sweep goes on")


def _is_done(run: RunDirectory, entry: Entry) -> bool:
    return _has_same_config(run, entry) and read_run(run.path).state == "finished"


def _has_same_config(run: RunDirectory, entry: Entry) -> bool:
    """Return whether the run has this configuration, and not one of an earlier sweep file."""
    if not run.checkpoints.is_dir():
        return False
    summary = read_run(run.path).summary
    return summary is not None and summary.config_hash == config_hash(entry.config)


def _arguments(found: Sweep, entry: Entry, run: RunDirectory) -> list[str]:
    """Return the arguments of `fitune train`, which resume a stopped run if it has a checkpoint."""
    if _has_same_config(run, entry) and any(run.checkpoints.iterdir()):
        return ["--resume", str(run.path)]
    arguments = [str(write_entry(found.directory, entry))]
    return [*arguments, "--overwrite"] if run.path.exists() else arguments


@contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in this process. The child receives it too and saves; this process waits."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _finish(found: Sweep, states: States, output_format: str) -> None:
    comparison: Comparison = compare([found.directory])
    page = found.directory / "report.html"
    write_page(comparison, page)
    if output_format == "json":
        print_json(
            {"sweep": str(found.directory), "report": str(page), **comparison_json(comparison)}
        )
    elif output_format == "quiet":
        print_text(page)
    else:
        show_comparison(comparison, console(output_format))
        print_text(translated(f"\nreport  {page}"))
    failed = [name for name, state in states.items() if state["state"] == "failed"]
    if failed:
        names = ", ".join(failed)
        raise FituneError(
            f"{len(failed)} of {len(states)} runs failed ({names}): the same command tries them again"
        )


def _search(found: Sweep, search: Search, states: States) -> None:
    """Let Optuna choose the settings of each run.

    Its study is stored in the sweep's directory, so that a search can be continued.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "a search needs Optuna: pip install 'fitune[search]'; a list or a grid needs nothing"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(found.directory / "study.jsonl"))
    study = optuna.create_study(
        study_name=found.directory.name,
        storage=optuna.storages.JournalStorage(backend),
        sampler=optuna.samplers.TPESampler(seed=0),
        direction="minimize",
        load_if_exists=True,
    )
    ended = (
        optuna.trial.TrialState.COMPLETE,
        optuna.trial.TrialState.PRUNED,
        optuna.trial.TrialState.FAIL,
    )

    def objective(trial: Any) -> float:
        overrides = {key: _suggest(trial, key, values) for key, values in search.space.items()}
        entry = make_entry(
            found.directory,
            found.tree,
            overrides,
            name=f"trial-{trial.number:04d}",
            typed=found.typed,
        )
        _note(f"trial {trial.number + 1} of {search.trials}: {overrides}")
        states.setdefault(
            entry.name, {"state": "waiting", "config_hash": config_hash(entry.config), "plan": None}
        )
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            states[entry.name] |= pool.submit(plan_content, entry.config).result()
        _run(found, entry, states)
        summary = (
            read_run(found.directory / entry.name).summary
            if states[entry.name]["state"] == "finished"
            else None
        )
        if summary is None or summary.eval_loss is None:
            raise optuna.TrialPruned
        return summary.eval_loss

    remaining = search.trials - len(study.get_trials(deepcopy=False, states=ended))
    study.optimize(objective, n_trials=max(remaining, 0), catch=(ConfigError,))


def _suggest(trial: Any, key: str, values: Any) -> object:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high = values["low"], values["high"]
    rest = {name: values[name] for name in ("log", "step") if name in values}
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, **rest)
    return trial.suggest_float(key, low, high, **rest)


def _note(message: str) -> None:
    print_aside(translated(message))
