"""Does a run from its configuration to its summary: a new run, a resumed one, or a replay.

Nothing is written before model and data are loaded, so a run that cannot work leaves no trace. A
run whose directory must not be replaced is refused before that. Nothing heavy is imported at the
top, so that this refusal is quick.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fitune.allocator.config import parse_allocator_config
from fitune.allocator.prediction import peak_json
from fitune.boundary import parse_json
from fitune.config import DataConfig, ModelConfig, ResolvedConfig, RunConfig, format_config
from fitune.distributed.processes import Ranks
from fitune.errors import RunDirectoryError, UsageError
from fitune.language import say
from fitune.machine.environment import environment
from fitune.model.source import check_source, check_tokenizer
from fitune.plain_files import read_plain
from fitune.planning.calibration import calibrate
from fitune.planning.plan import plan_json
from fitune.run.directory import RunDirectory, check_place, create_run, name_prefix, working_on
from fitune.run.files import write_atomically, write_json
from fitune.run.metrics import SCHEMA, RunEvent, Summary, append_line
from fitune.run.probe import write_probe
from fitune.run.watcher import Watcher
from fitune.units import format_bytes, format_count
from fitune.watch.prometheus import check_prometheus
from fitune.watch.trackers import check_trackers

if TYPE_CHECKING:
    from fitune.training.prepare import Prepared
    from fitune.training.resume import Replay, Start
    from fitune.training.self_check import SelfCheck


class RunScreen(Watcher, Protocol):
    """Shows a run to the user, beginning with its loading."""

    def begin(self, run: RunDirectory) -> None:
        """Show that the run has its directory now."""
        ...

    def stage(self, name: str) -> None:
        """Show what is being done before the first step."""
        ...


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """A run that begins."""

    resolved: ResolvedConfig
    #: replace an existing run of this name
    overwrite: bool = False
    #: refuse a setting that is predicted not to fit
    plan_check: bool = True


@dataclass(frozen=True, kw_only=True)
class ResumedRun:
    """A run that continues from its newest checkpoint."""

    run: RunDirectory
    resolved: ResolvedConfig
    #: keys of the configuration that may differ from the run's own
    allow_change: tuple[str, ...] = ()
    #: whether the configuration differs from the run's own and replaces it
    is_changed: bool = False


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """A run whose steps are repeated and compared, in a new directory next to its own."""

    run: RunDirectory
    resolved: ResolvedConfig
    plan_check: bool = True


def run_session(
    request: NewRun | ResumedRun | ReplayedRun, screen: RunScreen, *, ranks: Ranks | None = None
) -> tuple[RunDirectory, Summary]:
    """Do the run, together with the processes of `ranks`, of which only the first writes.

    Raises a FituneError for everything that a user can cause.
    """
    ranks = ranks or Ranks()
    if isinstance(request, ResumedRun):
        return request.run, _resume(request, screen, ranks)
    return _begin(request, screen, ranks)


def dry_run(request: NewRun | ResumedRun | ReplayedRun, screen: RunScreen, *, ranks: Ranks) -> None:
    """Load and check everything, and write nothing."""
    if isinstance(request, NewRun) and ranks.leads:
        _check_place(request.resolved.config, overwrite=request.overwrite)
    plan_check = not isinstance(request, ResumedRun) and request.plan_check
    prepared = _prepare(request.resolved.config, screen, plan_check=plan_check, ranks=ranks)
    if isinstance(request, NewRun):
        config = request.resolved.config
        _check_disk(config.run.output, config.optim.name, prepared, screen)


def _begin(
    request: NewRun | ReplayedRun, screen: RunScreen, ranks: Ranks
) -> tuple[RunDirectory, Summary]:
    """Do a run that begins, whether a new one or a replay."""
    config = request.resolved.config
    replay, settings, kept = None, None, None
    existing = _existing_run(request) if isinstance(request, NewRun) and ranks.leads else None
    if isinstance(request, ReplayedRun):
        settings, kept = _settings(request.run), request.run
    prepared = _prepare(
        config, screen, plan_check=request.plan_check, settings=settings, ranks=ranks
    )
    resolved = _dated(request.resolved, prepared)
    if config.train.probe:
        from fitune.training.probe import probe_position

        probe_position(
            config.train, config.batch.rows_per_step, prepared.data
        )  # raises if the run is too short for a probe
    if isinstance(request, ReplayedRun):
        from fitune.training.resume import read_replay

        replay = read_replay(request.run)
    if not ranks.leads:
        run = RunDirectory(ranks.exchange(Path())[0])
        prepared = _with_reference(config, prepared, run, screen, kept=kept, ranks=ranks)
        return run, _train(config, prepared, run, screen=screen, replay=replay, ranks=ranks)
    run = _new_directory(request, prepared, screen, existing=existing)
    screen.begin(run)
    with working_on(run):
        _write_start(run, resolved, prepared)
        ranks.exchange(run.path)
        prepared = _with_reference(config, prepared, run, screen, kept=kept, ranks=ranks)
        start = None
        if config.train.probe:
            config, prepared, start = _probe(resolved, prepared, run, screen)
        summary = _train(
            config, prepared, run, screen=screen, start=start, replay=replay, ranks=ranks
        )
    if prepared.plan is not None and ranks.size == 1:
        calibrate(prepared.plan, run.metrics)
    if replay is not None:
        screen.note(f"replay of {replay.path}: {len(replay.lines):,} steps, each bit for bit")
    return run, summary


def _existing_run(request: NewRun) -> RunDirectory | None:
    """Check the place of the run, and return its directory if that exists and may be used."""
    config = request.resolved.config
    name = config.run.name
    _check_place(config, overwrite=request.overwrite)
    if name is None or request.overwrite or not (config.run.output / name).exists():
        return None
    return create_run(config.run.output, name)


def _new_directory(
    request: NewRun | ReplayedRun,
    prepared: "Prepared",
    screen: RunScreen,
    *,
    existing: RunDirectory | None,
) -> RunDirectory:
    """Create the run's directory, unless it exists, on a disk with space for a checkpoint."""
    config, overwrite = request.resolved.config, False
    if isinstance(request, ReplayedRun):
        output, name = request.run.path.parent, f"{request.run.name}-replay-"
    else:
        output, name = config.run.output, config.run.name or _prefix(config)
        overwrite = request.overwrite
    _check_disk(output, config.optim.name, prepared, screen)
    return existing or create_run(output, name, overwrite=overwrite)


def _check_disk(output: Path, optimizer: str, prepared: "Prepared", screen: RunScreen) -> None:
    """Warn if not all checkpoints fit on the disk. Raises RunDirectoryError if not even one does."""
    from fitune.training.checkpoint.write import check_disk

    if (note := check_disk(output, prepared.setup, optimizer)) is not None:
        screen.note(f"warn   {note}")


def _write_start(run: RunDirectory, resolved: ResolvedConfig, prepared: "Prepared") -> None:
    """Write what is known before the first step: configuration, environment, data and plan."""
    from fitune.data.examples import data_json

    write_atomically(run.config, format_config(resolved))
    write_json(run.env, environment(resolved.config.run.output))
    write_json(run.data, data_json(prepared.data.train, prepared.data.eval))
    if prepared.self_check is not None:
        write_json(run.peak, peak_json(prepared.self_check.predicted))
    if prepared.plan is not None:
        plan = {"schema": SCHEMA, **plan_json(prepared.plan), "settings": prepared.settings}
        write_json(run.plan, plan)


def _resume(request: ResumedRun, screen: RunScreen, ranks: Ranks) -> Summary:
    """Resume a run. Its directory is not changed before everything is loaded and found to match."""
    run, resolved = request.run, request.resolved
    with working_on(run) if ranks.leads else nullcontext():
        screen.begin(run)
        from fitune.machine.process_memory import choose_device
        from fitune.training.checkpoint.read import newest_checkpoint
        from fitune.training.identity import run_conditions, run_identity
        from fitune.training.resume import go_on, pin_precision

        checkpoint, faults = newest_checkpoint(run)
        config = resolved.config
        if checkpoint is not None:
            if config.train.probe:
                raise UsageError("train.probe has no effect on a run that has begun: drop it")
            config = pin_precision(config, checkpoint, choose_device())
        prepared = _prepare(config, screen, plan_check=False, settings=_settings(run), ranks=ranks)
        setup, data = prepared.setup, prepared.data
        identity = run_identity(config, setup, train=data.train, held_out=data.eval)
        facts = (
            identity,
            run_conditions(setup, attention=config.model.attention, num_ranks=ranks.size),
        )
        start = go_on(
            run,
            checkpoint,
            setup,
            dropout=config.model.has_dropout,
            facts=facts,
            allowed=request.allow_change,
            ranks=ranks,
        )
        if request.is_changed and ranks.leads:
            write_atomically(run.config, format_config(resolved))
        start = replace(start, notes=(*faults, *start.notes))
        kept = None if checkpoint is None else run
        prepared = _with_reference(config, prepared, run, screen, kept=kept, ranks=ranks)
        if config.train.probe:
            config, prepared, start = _probe(resolved, prepared, run, screen)
        return _train(config, prepared, run, screen=screen, start=start, ranks=ranks)


def _with_reference(
    config: RunConfig,
    prepared: "Prepared",
    run: RunDirectory,
    screen: RunScreen,
    *,
    kept: RunDirectory | None,
    ranks: Ranks,
) -> "Prepared":
    """Return the prepared run with the reference's log-probabilities, if these are to be kept.

    kept: the run that has them; None to compute them, with weights that are not trained yet.
    """
    if config.reference != "kept":
        return prepared
    from fitune.training.reference import compute_reference, read_reference, write_reference

    if kept is not None:
        data = read_reference(kept, prepared.data)
    else:
        screen.stage(say("computing the log-probabilities under the reference"))
        found = compute_reference(prepared.setup, prepared.data, ranks=ranks)
        data = found.data
        for note in found.notes if ranks.leads else ():
            event = RunEvent(time=time.time(), step=0, kind="reference", message=note)
            append_line(run.events, event)
            screen.note(note)
    if ranks.leads and kept != run:
        write_reference(run, data)
    return replace(prepared, data=data)


def _train(
    config: RunConfig,
    prepared: "Prepared",
    run: RunDirectory,
    *,
    screen: RunScreen,
    start: "Start | None" = None,
    replay: "Replay | None" = None,
    ranks: Ranks,
) -> Summary:
    """Train, with trackers and the monitor in the first process only."""
    from fitune.training import loop, train
    from fitune.watch.monitor import watched

    watchers = (
        watched(config, prepared.setup, run, watcher=screen) if ranks.leads else nullcontext(screen)
    )
    with watchers as watcher:
        running = loop.TrainingLoop(
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
        return train.train(running)


def _probe(
    resolved: ResolvedConfig, prepared: "Prepared", run: RunDirectory, screen: RunScreen
) -> tuple[RunConfig, "Prepared", "Start"]:
    """Try other settings first, and return what the run continues with.

    The chosen configuration is written before the chosen branch becomes the run. A run that is
    killed between the two begins anew with the chosen setting and ends with the same weights.
    """
    from fitune.training.probe import adopt, try_settings

    tried = try_settings(
        resolved.config,
        prepared.setup,
        run,
        data=prepared.data,
        tokenizer=prepared.tokenizer,
        watcher=screen,
        self_check=prepared.self_check,
    )
    write_probe(run.probe, tried.probe)
    origins = {**resolved.origins, **dict.fromkeys(tried.changes, "probe")}
    write_atomically(run.config, format_config(ResolvedConfig(tried.config, origins)))
    start = adopt(run, tried, data=prepared.data)
    tokens, scale = format_count(tried.probe.cost_tokens), tried.probe.noise_scale_rows
    noise = "n/a" if scale is None else f"{scale:,.0f} samples"
    verdict = f"{tried.probe.verdict}; noise scale before training {noise}; {tokens} tokens on the other branches"
    for message in (*map(str, tried.probe.branches), verdict):
        append_line(run.events, RunEvent(time=time.time(), step=0, kind="probe", message=message))
    screen.note(f"probe  {verdict}")
    return tried.config, replace(prepared, setup=tried.setup), start


def _dated(resolved: ResolvedConfig, prepared: "Prepared") -> ResolvedConfig:
    """Return the configuration with the date that the chat template has written into the samples.

    The run can then be resumed on another day with the same tokens.
    """
    date = prepared.data.train.report.date
    if date is None or resolved.config.data.date == date:
        return resolved
    data = resolved.config.data.model_copy(update={"date": date})
    return ResolvedConfig(
        resolved.config.model_copy(update={"data": data}),
        {**resolved.origins, "data.date": "the run's start"},
    )


def _check_place(config: RunConfig, *, overwrite: bool) -> None:
    check_place(config.run.output, config.run.name or _prefix(config), overwrite=overwrite)


def _prefix(config: RunConfig) -> str:
    return name_prefix(config.model.source, config.data.train_sources[0].path)


def _settings(run: RunDirectory) -> list[str]:
    """Return what the plan of that run decided, which is nothing if it had no plan."""
    try:
        content = parse_json(read_plain(run.plan))
        return [str(setting) for setting in content["settings"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{run.plan} cannot be read, so the run cannot be gone on with as planned"
        ) from error


def _prepare(
    config: RunConfig,
    screen: RunScreen,
    *,
    plan_check: bool,
    settings: Sequence[str] | None = None,
    ranks: Ranks,
) -> "Prepared":
    if config.train.probe and ranks.size > 1:
        raise UsageError(
            f"train.probe works in one process and {ranks.size} were started: drop it, or torchrun"
        )
    if config.objective == "kto" and ranks.size > 1:
        raise UsageError(
            "objective kto compares with the mean over a whole batch, which works in one process "
            f"and {ranks.size} were started: drop torchrun"
        )
    parse_allocator_config(config.memory.allocator)
    if config.memory.allocator:
        # torch reads it when CUDA starts
        os.environ["PYTORCH_ALLOC_CONF"] = config.memory.allocator
    screen.note(
        f"model  {config.model.source} · data {', '.join(s.path for s in config.data.train_sources)}"
    )
    check_inputs(config.model, config.data)
    screen.stage(say("loading torch and transformers"))
    from fitune.training.prepare import prepare

    check_trackers(config.run.trackers)
    if config.run.prometheus is not None:
        check_prometheus(Path(config.run.prometheus))
    prepared = prepare(
        config, on_stage=screen.stage, plan_check=plan_check, settings=settings, ranks=ranks
    )
    screen.stage(say("starting"))
    report = prepared.data.train.report
    trainable, parameters = prepared.num_trainable_parameters, prepared.num_parameters
    screen.note(
        f"       {format_count(parameters)} parameters, {format_count(trainable)} trained, on {prepared.device} · "
        f"{len(prepared.data.train):,} samples, {format_count(report.train.num_tokens)} tokens, "
        f"{report.supervised_fraction:.1%} supervised · {len(prepared.data.eval):,} samples held out"
    )
    if prepared.self_check is not None:
        memory = _memory_text(prepared.self_check)
        screen.note(f"memory {memory}, predicted for step 2, where it will be measured")
    for message in (*prepared.setup.notes, *prepared.notes):
        screen.note(f"note   {message}")
    for message in report.warnings:
        screen.note(f"warn   {message}")
    return prepared


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Check that the model and the data exist, without imports that take seconds.

    Raises ModelError or DataError if they do not.
    """
    from fitune.data.files import check_files

    check_source(model.source)
    check_tokenizer(model)
    check_files(data)


def _memory_text(check: "SelfCheck") -> str:
    """Name what the lines of the steps show as their peak, and what a monitor of the system shows."""
    whole, part = (
        format_bytes(check.predicted.device_bytes),
        format_bytes(check.predicted.peak_reserved_bytes),
    )
    if check.program_bytes is None:
        return f"{part} reserved by PyTorch, {whole} with what else nvidia-smi shows"
    return f"{part} for the model and its steps, {whole} with Python and its libraries"
