"""Implement `fitune train`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from fitune.cli.arguments import RUNS, ConfigArguments, ConfigFlags, read_arguments, run_path
from fitune.cli.output import Format, print_json, print_text
from fitune.cli.progress import RunProgress, open_progress
from fitune.config import ResolvedConfig, format_config
from fitune.config.draft import COMMAND_LINE
from fitune.distributed.processes import joined
from fitune.errors import RunDirectoryError, UsageError
from fitune.language import say
from fitune.run.directory import (
    RunDirectory,
    check_run_files,
    list_runs,
    open_run,
)
from fitune.run.metrics import Summary, summary_json
from fitune.training import session
from fitune.training.session import NewRun, ReplayedRun, ResumedRun
from fitune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    pass


_EARLIER = Group("An earlier run", sort_key=2)
_START = Group("How to start", sort_key=3)


def train(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    resume: Annotated[
        str | None,
        Parameter(
            help="go on with this run: its directory or name, or latest",
            metavar="RUN",
            group=_EARLIER,
        ),
    ] = None,
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(help="what may differ from the run that goes on", metavar="KEY", group=_EARLIER),
    ] = (),
    replay: Annotated[
        Path | None,
        Parameter(
            help="do this run's steps once more and compare each one", metavar="RUN", group=_EARLIER
        ),
    ] = None,
    probe: Annotated[
        bool,
        Parameter(
            help="first try other learning rates and twice the batch (train.probe)", group=_START
        ),
    ] = False,
    overwrite: Annotated[
        bool, Parameter(help="replace an existing run of this name", group=_START)
    ] = False,
    print_config: Annotated[
        bool, Parameter(help="print the resolved configuration, and stop", group=_START)
    ] = False,
    dry_run: Annotated[
        bool,
        Parameter(help="load and check everything, and stop before the first step", group=_START),
    ] = False,
    no_plan_check: Annotated[
        bool,
        Parameter(help="start even where the prediction exceeds the memory limit", group=_START),
    ] = False,
    output_format: Format = "auto",
) -> None:
    """Train a configuration, or continue or replay a run.

    Refuses to replace an existing run without --overwrite.
    """
    _check_flags(
        resume=resume, replay=replay, overwrite=overwrite, allow_change=allow_change, probe=probe
    )
    earlier = _earlier_run(resume, replay, output=flags.output)
    resolved = read_arguments(
        words,
        flags,
        overrides=["train.probe=true"] if probe else [],
        source=None if earlier is None else earlier.config,
    )
    if earlier is not None and resolved.config.model.trust_remote_code:
        _check_trust(earlier, resolved)
    if earlier is not None and resolved.origins["run.name"] == COMMAND_LINE:
        raise UsageError("run.name has no effect on a run that exists already: drop it")
    if print_config:
        _print_config(resolved, output_format)
        return
    quiet = output_format == "quiet"
    request: NewRun | ResumedRun | ReplayedRun
    if earlier is None:
        request = NewRun(resolved=resolved, overwrite=overwrite, plan_check=not no_plan_check)
    elif replay is not None:
        request = ReplayedRun(run=earlier, resolved=resolved, plan_check=not no_plan_check)
    else:
        is_changed = bool(words) or flags != ConfigFlags(output=flags.output)
        request = ResumedRun(
            run=earlier, resolved=resolved, allow_change=allow_change, is_changed=is_changed
        )
    with joined() as ranks, open_progress(quiet=quiet or not ranks.leads) as progress:
        if dry_run:
            session.dry_run(request, progress, ranks=ranks)
            progress.note("dry run: model, data and settings fit together; nothing was written")
            return
        run, summary = session.run_session(request, progress, ranks=ranks)
        _report(run, summary, progress)
    if not ranks.leads:
        return
    if output_format == "json":
        print_json({"run": str(run.path), "summary": summary_json(summary)})
    else:
        print_text(run.path)


def _check_trust(run: RunDirectory, resolved: ResolvedConfig) -> None:
    """Raise UsageError unless the command line itself allows Python code of the model to run.

    Somebody else may have made the run directory, so its configuration alone must not allow it.
    """
    if resolved.origins["model.trust_remote_code"] != COMMAND_LINE:
        raise UsageError(
            f"{run.path} asks to run the Python code that comes with "
            f"{resolved.config.model.source}: read that code, then add "
            "model.trust_remote_code=true to this command"
        )


def _check_flags(
    *,
    resume: str | None,
    replay: Path | None,
    overwrite: bool,
    allow_change: tuple[str, ...],
    probe: bool,
) -> None:
    if resume is not None and replay is not None:
        raise UsageError(
            "--resume and --replay exclude each other: go on with a run, or do it once more"
        )
    if overwrite and (resume is not None or replay is not None):
        raise UsageError("--overwrite begins a run anew: drop it, or --resume and --replay")
    if probe and (resume is not None or replay is not None):
        raise UsageError("--probe begins a run: drop it, or --resume and --replay")
    if allow_change and resume is None:
        raise UsageError("--allow-change is for --resume: drop it, or name the run that goes on")


def _earlier_run(
    resume: str | None, replay: Path | None, *, output: str | None
) -> RunDirectory | None:
    """Return the run to continue or replay, if any. Raises RunDirectoryError if it is missing."""
    if resume == "latest":
        directory = Path(output or "runs")
        records = list_runs(directory)
        if not records:
            raise RunDirectoryError(
                f"there are no runs in {directory}: give the directory of one, or --output"
            )
        run = records[-1].run
    elif resume is not None or replay is not None:
        run = open_run(
            run_path(Path(resume) if resume is not None else replay or Path(), Path(output or RUNS))
        )
    else:
        return None
    check_run_files(run, deep=True)
    if not run.config.exists():
        raise RunDirectoryError(
            f"{run.path} was stopped before it began: start it again as it was started"
        )
    return run


def _report(run: RunDirectory, summary: Summary, progress: RunProgress) -> None:
    loss = "n/a" if summary.eval_loss is None else f"{summary.eval_loss:.4f}"
    peak = summary.peak_reserved_bytes or summary.peak_device_bytes
    progress.note(
        f"{summary.status} after {summary.steps:,} steps, {format_count(summary.tokens)} tokens, "
        f"{format_seconds(summary.seconds)} | eval loss {loss} | peak memory {format_bytes(peak)}"
    )
    weights = run.best if run.best.exists() else run.last
    progress.note(f"weights: {weights}")
    for line in next_commands(run, weights, is_finished=summary.status == "finished"):
        progress.note(line)


def next_commands(run: RunDirectory, weights: Path, *, is_finished: bool) -> Iterator[str]:
    """Yield messages with the commands that a user may want to run next."""
    name = run.name if run.path.parent == RUNS else str(run.path)
    if not is_finished:
        yield say("next: {command} goes on with it", command=f"fitune train --resume {name}")
        return
    export = f"fitune export {name} --to hf -o {run.name}-hf"
    if (weights / "adapter_config.json").exists():
        yield say(
            "{weights} is an adapter, which needs the model that it was trained on: {command} merges both into one",
            weights=weights,
            command=export,
        )
    else:
        yield say(
            "{weights} is a transformers directory; {command} copies it",
            weights=weights,
            command=export,
        )
    yield say(
        "next: {commands}",
        commands=f"fitune report {name}   fitune advise {name}   fitune watch {name} --once",
    )


def _print_config(resolved: ResolvedConfig, output_format: str) -> None:
    if output_format == "json":
        print_json(
            {"config": resolved.config.model_dump(mode="json"), "origins": dict(resolved.origins)}
        )
    else:
        print_text(format_config(resolved), end="")
