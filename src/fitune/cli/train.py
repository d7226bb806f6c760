"""`fitune train`: train by a configuration."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from fitune.boundary import parse_json
from fitune.cli.arguments import RUNS, ConfigArguments, ConfigFlags, check_inputs, read_arguments, run_path
from fitune.cli.output import SCHEMA, Format, print_json, print_text
from fitune.cli.progress import RunProgress, open_progress
from fitune.config import ResolvedConfig, RunConfig, format_config
from fitune.config.read import COMMAND_LINE
from fitune.errors import RunDirectoryError, UsageError
from fitune.language import say
from fitune.memory.allocator_config import parse_allocator_config
from fitune.memory.environment import environment
from fitune.plan.calibration import calibrate
from fitune.plan.plan import plan_json
from fitune.run.directory import (
    RunDirectory,
    check_files,
    check_place,
    create_run,
    list_runs,
    name_prefix,
    open_run,
    working_on,
    write_atomically,
    write_json,
)
from fitune.run.files import read_plain
from fitune.run.metrics import RunEvent, Summary, append_line, summary_json
from fitune.train.ranks import Ranks, joined
from fitune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from fitune.train.prepare import Prepared
    from fitune.train.resume import Replay, Start
    from fitune.train.self_check import SelfCheck


_EARLIER = Group("An earlier run", sort_key=2)
_START = Group("How to start", sort_key=3)


def train(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    resume: Annotated[
        str | None,
        Parameter(help="go on with this run: its directory or name, or latest", metavar="RUN", group=_EARLIER),
    ] = None,
    allow_change: Annotated[
        tuple[str, ...], Parameter(help="what may differ from the run that goes on", metavar="KEY", group=_EARLIER)
    ] = (),
    replay: Annotated[
        Path | None,
        Parameter(help="do this run's steps once more and compare each one", metavar="RUN", group=_EARLIER),
    ] = None,
    probe: Annotated[
        bool, Parameter(help="first try other learning rates and twice the batch (train.probe)", group=_START)
    ] = False,
    overwrite: Annotated[bool, Parameter(help="replace an existing run of this name", group=_START)] = False,
    print_config: Annotated[bool, Parameter(help="print the resolved configuration, and stop", group=_START)] = False,
    dry_run: Annotated[
        bool, Parameter(help="load and check everything, and stop before the first step", group=_START)
    ] = False,
    no_plan_check: Annotated[
        bool, Parameter(help="start even where the prediction exceeds the memory limit", group=_START)
    ] = False,
    output_format: Format = "auto",
) -> None:
    """Train by a configuration, or go on with a run. An existing run is refused unless --overwrite."""
    _check_flags(resume=resume, replay=replay, overwrite=overwrite, allow_change=allow_change, probe=probe)
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
    with joined() as ranks, open_progress(quiet=quiet or not ranks.leads) as progress:
        if dry_run:
            if earlier is None and ranks.leads:
                _check_place(resolved.config, overwrite=overwrite)
            _prepare(resolved.config, progress, plan_check=not no_plan_check, ranks=ranks)
            progress.note("dry run: model, data and settings fit together; nothing was written")
            return
        if earlier is not None and replay is None:
            is_changed = bool(words) or flags != ConfigFlags(output=flags.output)
            summary = _resume(
                earlier, resolved, progress, allow_change=allow_change, is_changed=is_changed, ranks=ranks
            )
            run = earlier
        else:
            run, summary = run_training(
                resolved, progress, overwrite=overwrite, plan_check=not no_plan_check, replayed=earlier, ranks=ranks
            )
        _report(run, summary, progress)
    if not ranks.leads:
        return
    if output_format == "json":
        print_json({"run": str(run.path), "summary": summary_json(summary)})
    else:
        print_text(run.path)


def _check_trust(run: RunDirectory, resolved: ResolvedConfig) -> None:
    """Whoever made the directory need not be who goes on with it, so its word alone runs no code."""
    if resolved.origins["model.trust_remote_code"] != COMMAND_LINE:
        raise UsageError(
            f"{run.path} asks to run the Python code that comes with {resolved.config.model.source}: read that code, "
            "then add model.trust_remote_code=true to this command"
        )


def run_training(
    resolved: ResolvedConfig,
    progress: RunProgress,
    *,
    overwrite: bool = False,
    plan_check: bool = True,
    replayed: RunDirectory | None = None,
    ranks: Ranks | None = None,
) -> tuple[RunDirectory, Summary]:
    """Everything of a run from its configuration to its summary. Nothing is written before model and data are loaded,
    so that what cannot work leaves no trace; only a run that would be refused is refused at once.

    replayed: the run whose steps are done once more, in a directory of its own beside it. ranks: the processes that do
    this together, of which the first alone writes."""
    ranks = ranks or Ranks()
    config = resolved.config
    name = config.run.name
    run = None
    if replayed is not None:
        name = f"{replayed.name}-replay-"
    elif ranks.leads:
        _check_place(config, overwrite=overwrite)
        if name is not None and (config.run.output / name).exists() and not overwrite:
            run = create_run(config.run.output, name)
    settings = None if replayed is None else _settings(replayed)
    prepared = _prepare(config, progress, plan_check=plan_check, settings=settings, ranks=ranks)
    resolved = _dated(resolved, prepared)
    from fitune.data.examples import data_json
    from fitune.memory.prediction import peak_json
    from fitune.train.checkpoint import check_disk
    from fitune.train.resume import read_replay

    if config.train.probe:
        from fitune.train.probe import probe_position

        probe_position(config, prepared.data)  # refuses what is too short for one

    replay = None if replayed is None else read_replay(replayed)
    if not ranks.leads:
        run = RunDirectory(ranks.exchange(Path())[0])
        return run, _train(config, prepared, run, progress=progress, replay=replay, ranks=ranks)
    output = config.run.output if replayed is None else replayed.path.parent
    if (note := check_disk(output, prepared.setup, config.optim.name)) is not None:
        progress.note(f"warn   {note}")
    if run is None:
        run = create_run(output, name or _prefix(config), overwrite=overwrite)
    progress.begin(run)
    with working_on(run):
        write_atomically(run.config, format_config(resolved))
        write_json(run.env, environment(config.run.output))
        write_json(run.data, data_json(prepared.data.train, prepared.data.eval))
        if prepared.self_check is not None:
            write_json(run.peak, peak_json(prepared.self_check.predicted))
        if prepared.plan is not None:
            write_json(run.plan, {"schema": SCHEMA, **plan_json(prepared.plan), "settings": prepared.settings})
        ranks.exchange(run.path)
        start = None
        if config.train.probe:
            config, prepared, start = _probe(resolved, prepared, run, progress)
        summary = _train(config, prepared, run, progress=progress, start=start, replay=replay, ranks=ranks)
    if prepared.plan is not None and ranks.size == 1:
        calibrate(prepared.plan, run.metrics)
    if replay is not None:
        progress.note(f"replay of {replay.path}: {len(replay.lines):,} steps, each bit for bit")
    return run, summary


def _resume(
    run: RunDirectory,
    resolved: ResolvedConfig,
    progress: RunProgress,
    *,
    allow_change: tuple[str, ...],
    is_changed: bool,
    ranks: Ranks,
) -> Summary:
    """Nothing in the directory changes before everything is loaded and found to be the same run."""
    with working_on(run) if ranks.leads else nullcontext():
        progress.begin(run)
        from fitune.model.device import choose_device
        from fitune.train.checkpoint import newest_checkpoint
        from fitune.train.identity import run_conditions, run_identity
        from fitune.train.resume import go_on, pin_precision

        checkpoint, faults = newest_checkpoint(run)
        config = resolved.config
        if checkpoint is not None:
            if config.train.probe:
                raise UsageError("train.probe has no effect on a run that has begun: drop it")
            config = pin_precision(config, checkpoint, choose_device())
        prepared = _prepare(config, progress, plan_check=False, settings=_settings(run), ranks=ranks)
        setup, data = prepared.setup, prepared.data
        identity = run_identity(config, setup, train=data.train, held_out=data.eval)
        facts = (identity, run_conditions(config, setup, num_ranks=ranks.size))
        start = go_on(run, checkpoint, setup, config=config, facts=facts, allowed=allow_change, ranks=ranks)
        if is_changed and ranks.leads:
            write_atomically(run.config, format_config(resolved))
        start = replace(start, notes=(*faults, *start.notes))
        if config.train.probe:
            config, prepared, start = _probe(resolved, prepared, run, progress)
        return _train(config, prepared, run, progress=progress, start=start, ranks=ranks)


def _train(
    config: RunConfig,
    prepared: "Prepared",
    run: RunDirectory,
    *,
    progress: RunProgress,
    start: "Start | None" = None,
    replay: "Replay | None" = None,
    ranks: Ranks,
) -> Summary:
    """Trackers and the monitor watch the first process only."""
    from fitune.train.loop import train as train_loop
    from fitune.train.monitor import watched

    watchers = watched(config, prepared.setup, run, watcher=progress) if ranks.leads else nullcontext(progress)
    with watchers as watcher:
        return train_loop(
            config,
            prepared.setup,
            run,
            data=prepared.data,
            tokenizer=prepared.tokenizer,
            watcher=watcher,
            self_check=prepared.self_check,
            start=start,
            replay=replay,
            ranks=ranks,
        )


def _probe(
    resolved: ResolvedConfig, prepared: "Prepared", run: RunDirectory, progress: RunProgress
) -> tuple[RunConfig, "Prepared", "Start"]:
    """What the run goes on with. Its configuration is written before the chosen branch becomes the run: killed between
    the two, it begins anew with the chosen setting and ends in the same weights."""
    from fitune.run.probe import write_probe
    from fitune.train.probe import adopt, try_settings

    tried = try_settings(
        resolved.config,
        prepared.setup,
        run,
        data=prepared.data,
        tokenizer=prepared.tokenizer,
        watcher=progress,
        self_check=prepared.self_check,
    )
    write_probe(run.probe, tried.probe)
    origins = {**resolved.origins, **dict.fromkeys(tried.changes, "probe")}
    write_atomically(run.config, format_config(ResolvedConfig(tried.config, origins)))
    start = adopt(run, tried, data=prepared.data)
    tokens, scale = format_count(tried.probe.cost_tokens), tried.probe.noise_scale_rows
    noise = "n/a" if scale is None else f"{scale:,.0f} samples"
    verdict = f"{tried.probe.verdict}; noise scale before training {noise}; {tokens} tokens on the other branches"
    for sentence in (*map(str, tried.probe.branches), verdict):
        append_line(run.events, RunEvent(time=time.time(), step=0, kind="probe", message=sentence))
    progress.note(f"probe  {verdict}")
    return tried.config, replace(prepared, setup=tried.setup), start


def _dated(resolved: ResolvedConfig, prepared: "Prepared") -> ResolvedConfig:
    """With the date that the chat template has written into the rows, so that the run goes on with the same tokens."""
    date = prepared.data.train.report.date
    if date is None or resolved.config.data.date == date:
        return resolved
    data = resolved.config.data.model_copy(update={"date": date})
    return ResolvedConfig(
        resolved.config.model_copy(update={"data": data}), {**resolved.origins, "data.date": "the run's start"}
    )


def _check_place(config: RunConfig, *, overwrite: bool) -> None:
    check_place(config.run.output, config.run.name or _prefix(config), overwrite=overwrite)


def _prefix(config: RunConfig) -> str:
    return name_prefix(config.model.source, config.data.train_sources[0].path)


def _check_flags(
    *, resume: str | None, replay: Path | None, overwrite: bool, allow_change: tuple[str, ...], probe: bool
) -> None:
    if resume is not None and replay is not None:
        raise UsageError("--resume and --replay exclude each other: go on with a run, or do it once more")
    if overwrite and (resume is not None or replay is not None):
        raise UsageError("--overwrite begins a run anew: drop it, or --resume and --replay")
    if probe and (resume is not None or replay is not None):
        raise UsageError("--probe begins a run: drop it, or --resume and --replay")
    if allow_change and resume is None:
        raise UsageError("--allow-change is for --resume: drop it, or name the run that goes on")


def _earlier_run(resume: str | None, replay: Path | None, *, output: str | None) -> RunDirectory | None:
    """The run that goes on or is replayed. Raises RunDirectoryError where there is none."""
    if resume == "latest":
        directory = Path(output or "runs")
        records = list_runs(directory)
        if not records:
            raise RunDirectoryError(f"there are no runs in {directory}: give the directory of one, or --output")
        run = records[-1].run
    elif resume is not None or replay is not None:
        run = open_run(run_path(Path(resume) if resume is not None else replay or Path(), Path(output or RUNS)))
    else:
        return None
    check_files(run, deep=True)
    if not run.config.exists():
        raise RunDirectoryError(f"{run.path} was stopped before it began: start it again as it was started")
    return run


def _settings(run: RunDirectory) -> list[str]:
    """What the plan of that run decided; nothing where it had none."""
    try:
        content = parse_json(read_plain(run.plan))
        return [str(setting) for setting in content["settings"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{run.plan} cannot be read, so the run cannot be gone on with as planned") from error


def _prepare(
    config: RunConfig,
    progress: RunProgress,
    *,
    plan_check: bool,
    settings: Sequence[str] | None = None,
    ranks: Ranks,
) -> "Prepared":
    if config.train.probe and ranks.size > 1:
        raise UsageError(f"train.probe works in one process and {ranks.size} were started: drop it, or torchrun")
    parse_allocator_config(config.memory.allocator)
    if config.memory.allocator:
        os.environ["PYTORCH_ALLOC_CONF"] = config.memory.allocator  # read when CUDA starts, so before torch is used
    progress.note(f"model  {config.model.source} · data {', '.join(s.path for s in config.data.train_sources)}")
    check_inputs(config)
    progress.stage(say("loading torch and transformers"))
    from fitune.train.prepare import prepare
    from fitune.train.prometheus import check_prometheus
    from fitune.train.trackers import check_trackers

    check_trackers(config)
    if config.run.prometheus is not None:
        check_prometheus(Path(config.run.prometheus))
    prepared = prepare(config, on_stage=progress.stage, plan_check=plan_check, settings=settings, ranks=ranks)
    progress.stage(say("starting"))
    report = prepared.data.train.report
    trainable, parameters = prepared.num_trainable_parameters, prepared.num_parameters
    progress.note(
        f"       {format_count(parameters)} parameters, {format_count(trainable)} trained, on {prepared.device} · "
        f"{len(prepared.data.train):,} samples, {format_count(report.train.num_tokens)} tokens, "
        f"{report.supervised_fraction:.1%} supervised · {len(prepared.data.eval):,} samples held out"
    )
    if prepared.self_check is not None:
        progress.note(f"       {_memory_words(prepared.self_check)}, predicted for step 2, where it will be measured")
    for sentence in (*prepared.setup.notes, *prepared.notes):
        progress.note(f"note   {sentence}")
    for sentence in report.warnings:
        progress.note(f"warn   {sentence}")
    return prepared


def _memory_words(check: "SelfCheck") -> str:
    """Names the two figures that the lines of a run show: all of the memory, and the part of it that its steps tell."""
    whole, part = format_bytes(check.predicted.device_bytes), format_bytes(check.predicted.peak_reserved_bytes)
    if check.program_bytes is None:
        return f"{whole} of memory in all, as nvidia-smi shows it, {part} of it reserved by PyTorch, as steps show it"
    return f"{whole} of memory in all for the process, {part} of it beside the program, as steps show it"


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
    """What can be done with the run now."""
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
        yield say("{weights} is a transformers directory; {command} copies it", weights=weights, command=export)
    yield say("next: {commands}", commands=f"fitune report {name}   fitune advise {name}   fitune watch {name} --once")


def _print_config(resolved: ResolvedConfig, output_format: str) -> None:
    if output_format == "json":
        print_json({"config": resolved.config.model_dump(mode="json"), "origins": dict(resolved.origins)})
    else:
        print_text(format_config(resolved), end="")
