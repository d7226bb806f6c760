"""`fitune train`: train by a configuration."""

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fitune.cli.arguments import ConfigArguments, ConfigFlags, read_arguments
from fitune.cli.output import Format, print_json
from fitune.cli.progress import TrainingProgress
from fitune.config import ResolvedConfig, RunConfig, format_config
from fitune.memory.allocator_config import parse_allocator_config
from fitune.memory.environment import environment
from fitune.run.directory import RunDirectory, create_run, name_prefix, working_on, write_atomically, write_json
from fitune.run.metrics import Summary, summary_json
from fitune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from fitune.train.prepare import Prepared


def train(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    overwrite: Annotated[bool, Parameter(help="replace an existing run of this name")] = False,
    print_config: Annotated[bool, Parameter(help="print the resolved configuration, and stop")] = False,
    dry_run: Annotated[bool, Parameter(help="load and check everything, and stop before the first step")] = False,
    no_plan_check: Annotated[bool, Parameter(help="start even where the prediction exceeds memory.budget")] = False,
    output_format: Format = "auto",
) -> None:
    """Train by a configuration. An existing run is refused unless --overwrite."""
    resolved = read_arguments(words, flags)
    if print_config:
        _print_config(resolved, output_format)
        return
    quiet = output_format == "quiet"
    with TrainingProgress(quiet=quiet) as progress:
        if dry_run:
            _prepare(resolved.config, progress, plan_check=not no_plan_check)
            progress.note("dry run: model, data and settings fit together; nothing was written")
            return
        run, summary = run_training(resolved, progress, overwrite=overwrite, plan_check=not no_plan_check)
        _report(run, summary, progress)
    if output_format == "json":
        print_json({"run": str(run.path), "summary": summary_json(summary)})
    else:
        print(run.path)


def run_training(
    resolved: ResolvedConfig, progress: TrainingProgress, *, overwrite: bool = False, plan_check: bool = True
) -> tuple[RunDirectory, Summary]:
    """Everything of a run from its configuration to its summary. Nothing is written before model and data are loaded,
    so that what cannot work leaves no trace; only a run that would be refused is refused at once."""
    config = resolved.config
    name = config.run.name
    run = None
    if name is not None and (config.run.output / name).exists() and not overwrite:
        run = create_run(config.run.output, name)  # refuses unless it is an empty directory
    prepared = _prepare(config, progress, plan_check=plan_check)
    from fitune.train.loop import train as train_loop
    from fitune.train.monitor import watched

    if run is None:
        prefix = name_prefix(config.model.source, config.data.train_sources[0].path)
        run = create_run(config.run.output, name or prefix, overwrite=overwrite)
    progress.note(f"run    {run.path}")
    with working_on(run):
        write_atomically(run.config, format_config(resolved))
        write_json(run.env, environment(config.run.output))
        with watched(config, prepared.setup, run, watcher=progress) as watcher:
            summary = train_loop(
                config,
                prepared.setup,
                run,
                data=prepared.data,
                tokenizer=prepared.tokenizer,
                watcher=watcher,
                self_check=prepared.self_check,
            )
    return run, summary


def _prepare(config: RunConfig, progress: TrainingProgress, *, plan_check: bool) -> "Prepared":
    parse_allocator_config(config.memory.allocator)
    if config.memory.allocator:
        os.environ["PYTORCH_ALLOC_CONF"] = config.memory.allocator  # read when CUDA starts, so before torch is used
    progress.note(f"model  {config.model.source} · data {', '.join(s.path for s in config.data.train_sources)}")
    from fitune.train.prepare import prepare
    from fitune.train.trackers import check_trackers

    check_trackers(config)
    prepared = prepare(config, on_progress=progress.rows, plan_check=plan_check)
    progress.rows(None)
    report = prepared.data.train.report
    trainable, parameters = prepared.num_trainable_parameters, prepared.num_parameters
    progress.note(
        f"       {format_count(parameters)} parameters, {format_count(trainable)} trained, on {prepared.device} · "
        f"{len(prepared.data.train):,} rows, {format_count(report.train.num_tokens)} tokens, "
        f"{report.supervised_fraction:.1%} supervised · {len(prepared.data.eval):,} rows held out"
    )
    if prepared.self_check is not None:
        needed = format_bytes(prepared.self_check.predicted.device_bytes)
        progress.note(f"       {needed} of memory predicted for step 2, where it will be measured")
    for sentence in (*prepared.setup.notes, *prepared.notes):
        progress.note(f"note   {sentence}")
    for sentence in report.warnings:
        progress.note(f"warn   {sentence}")
    return prepared


def _report(run: RunDirectory, summary: Summary, progress: TrainingProgress) -> None:
    loss = "n/a" if summary.eval_loss is None else f"{summary.eval_loss:.4f}"
    peak = summary.measured_reserved_bytes or summary.measured_device_bytes
    progress.note(
        f"{summary.status} after {summary.steps:,} steps, {format_count(summary.tokens)} tokens, "
        f"{format_seconds(summary.seconds)} | eval loss {loss} | peak memory {format_bytes(peak)}"
    )
    progress.note(f"weights: {run.best if run.best.exists() else run.last}")


def _print_config(resolved: ResolvedConfig, output_format: str) -> None:
    if output_format == "json":
        print_json({"config": resolved.config.model_dump(mode="json"), "origins": dict(resolved.origins)})
    else:
        print(format_config(resolved), end="")
