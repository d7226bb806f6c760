"""Tries learning rates and batch sizes at the beginning of a run, as `train.probe` asks.

First the gradient noise is measured without a step. Then each setting trains a branch: the first
part of the run, with the same weights, the same samples in the same order, and the same schedule in
tokens. The branches' losses on the held-out samples are compared sample by sample. The run
continues from a branch that is better than the configured setting by more than chance, or else from
the configured one. Either way it is the run that the chosen setting would have been from the
beginning. `config.yaml` stores the chosen setting before anything else of it is stored, so a run
that is killed at any point ends with the same weights.

A short branch judges only the beginning. A high rate that is ahead early may be behind at the end,
when the schedule has lowered it, and the other way round (short-horizon bias, Wu et al. 2018, arXiv
1803.02021).
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.batch_size.noise import (
    NoiseAverages,
    NoiseEstimate,
    estimate,
    pairwise_sample,
    update_averages,
)
from fitune.batch_size.norms import NormRecorder
from fitune.batch_size.scaling import OptimSettings, scale, with_settings
from fitune.config import OptimConfig, RunConfig, TrainConfig
from fitune.data.batches import Epochs, batches
from fitune.data.examples import Examples
from fitune.errors import ConfigError, FituneError, InterruptedRunError
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.guard import Guard
from fitune.run.directory import RunDirectory, create_run
from fitune.run.interval import ConfidenceInterval, paired_interval
from fitune.run.metrics import Summary, read_summary
from fitune.run.probe import LEVEL, Branch, Probe, choose
from fitune.run.watcher import Watcher, Watchers
from fitune.step.assemble import Setup
from fitune.step.evaluate import EvalResult
from fitune.step.optimizer import build_optimizer
from fitune.training.checkpoint.content import live_tensors
from fitune.training.checkpoint.read import newest_checkpoint
from fitune.training.identity import run_conditions, run_identity
from fitune.training.length import run_length
from fitune.training.loop import TrainingLoop
from fitune.training.resume import Start, go_on
from fitune.training.samples import Data, micro_batches_of
from fitune.training.self_check import SelfCheck
from fitune.training.train import train

#: The fewest steps of a branch with the configured batch. With fewer, the branch with twice the
#: batch would have three or less, which say nothing.
FEWEST_STEPS = 8
NOISE_MICRO_BATCHES = 32
MICRO_BATCHES_AT_ONCE = 4
FEWEST_EVAL_ROWS = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """Factors that are applied to the configured rate and batch."""

    name: str
    lr_factor: float
    batch_factor: int


SETTINGS = (
    Setting("configured", 1.0, 1),
    Setting("half the rate", 0.5, 1),
    Setting("twice the rate", 2.0, 1),
    Setting("twice the batch, sqrt 2 the rate", math.sqrt(2), 2),
)


@dataclass(frozen=True)
class Tried:
    """The result of trying the settings."""

    probe: Probe
    #: of the run that continues, in which train.probe is off
    config: RunConfig
    #: the keys and values that differ from the configuration before
    changes: Mapping[str, object]
    #: of the chosen setting, with a new optimizer
    setup: Setup


def try_settings(
    config: RunConfig,
    setup: Setup,
    run: RunDirectory,
    *,
    data: Data,
    tokenizer: Tokenizer,
    watcher: Watcher,
    self_check: SelfCheck | None = None,
) -> Tried:
    """Train a branch with each setting, and choose one of them.

    Each branch is a run of its own in `run.branches`; only the chosen one stays there. `setup` must
    be new, and its model is restored to its first state afterwards.

    Raises ConfigError like `probe_position`, FituneError if every setting diverges, and what
    `train` raises.
    """
    position = probe_position(config.train, config.batch.rows_per_step, data)
    shutil.rmtree(run.branches, ignore_errors=True)
    first = {
        name: tensor.to("cpu", copy=True) for name, tensor in live_tensors(setup.model).items()
    }
    noise = noise_before_training(
        config, _with_new_optimizer(config.optim, setup, setup.optim), data.train, watcher=watcher
    )
    branches: list[Branch] = []
    configured: EvalResult | None = None
    for number, setting in enumerate(SETTINGS):
        changed, optim, _ = apply_setting(config, setup, setting)
        own = _with_new_optimizer(changed.optim, setup, optim)
        summary, result = _branch(
            changed,
            own,
            create_run(run.branches, str(number)),
            data=data,
            tokenizer=tokenizer,
            self_check=self_check
            if number == 0 or self_check is None
            else replace(self_check, circumstances=None),
            position=position,
        )
        configured = result if number == 0 else configured
        branches.append(
            Branch(
                name=setting.name,
                lr=optim.lr,
                rows=changed.batch.rows_per_step,
                steps=summary.steps,
                tokens=summary.tokens,
                seconds=summary.seconds,
                eval_loss=math.inf if result is None else result.loss,
                difference=_difference(result, configured) if number else None,
            )
        )
        watcher.note(f"probe  {branches[-1]}")
        for other in set(range(number + 1)) - {choose(branches)}:
            shutil.rmtree(run.branches / str(other), ignore_errors=True)
        _restore_weights(setup, first)
    if not math.isfinite(branches[choose(branches)].eval_loss):
        raise FituneError(
            f"every setting of the probe diverged: lower optim.lr ({setup.peak_lr:g})"
        )
    probe = _result(noise, branches, data.train)
    changed, optim, changes = apply_setting(config, setup, SETTINGS[probe.chosen])
    return Tried(probe, changed, changes, _with_new_optimizer(changed.optim, setup, optim))


def _result(noise: NoiseEstimate | None, branches: Sequence[Branch], train: Examples) -> Probe:
    """Describe the branches and the noise scale, which is converted from tokens to samples."""
    tokens_per_sample = train.weight_per_token * train.num_tokens / len(train)

    def in_samples(tokens: float | None) -> float | None:
        return None if tokens is None or math.isinf(tokens) else tokens / tokens_per_sample

    return Probe(
        noise_scale_rows=None if noise is None else in_samples(noise.scale_tokens),
        noise_low_rows=None if noise is None else in_samples(noise.scale_low_tokens),
        noise_high_rows=None if noise is None else in_samples(noise.scale_high_tokens),
        branches=tuple(branches),
    )


def _branch(
    config: RunConfig,
    setup: Setup,
    run: RunDirectory,
    *,
    data: Data,
    tokenizer: Tokenizer,
    self_check: SelfCheck | None,
    position: int,
) -> tuple[Summary, EvalResult | None]:
    """Train one branch and evaluate it; the result is None if it diverged.

    The evaluation is neither in the branch's state nor in its logs, because the run that continues
    has not done it.
    """
    try:
        loop = TrainingLoop(
            config,
            setup,
            run,
            data=data,
            tokenizer=tokenizer,
            watcher=Watchers(()),  # the branch's result is shown when it is finished
            self_check=self_check,
            until=position,
        )
        summary = train(loop)
    except InterruptedRunError as error:
        whole = run.path.parent.parent
        interrupted = InterruptedRunError(
            f"interrupted in the probe: fitune train --resume {whole} begins it anew"
        )
        interrupted.exit_code = error.exit_code
        raise interrupted from error
    except FituneError as error:
        if type(error) is not FituneError:  # FituneError itself means a gradient that is not finite
            raise
        return read_summary(run.summary), None
    micro_batches = micro_batches_of(
        data.eval, range(len(data.eval)), setup.eval_layout, rows_at_once=config.batch.rows_per_step
    )
    result = safe_evaluate(
        setup.model, micro_batches, settings=setup.settings, query_free_bytes=lambda: None
    ).result
    return summary, result if math.isfinite(result.loss) else None


def adopt(run: RunDirectory, tried: Tried, *, data: Data) -> Start:
    """Make the chosen branch the run.

    The run's directory must have the configuration of `tried` already.
    """
    branch = RunDirectory(run.branches / str(tried.probe.chosen))
    for source, target in (
        (branch.metrics, run.metrics),
        (branch.eval_rows, run.eval_rows),
        (branch.answers, run.answers),
        (branch.journal, run.journal),
    ):
        if source.exists():
            source.replace(target)
    if branch.events.exists():
        with run.events.open("ab") as events:
            events.write(branch.events.read_bytes())
    for checkpoint in sorted(branch.checkpoints.iterdir()):
        checkpoint.rename(run.checkpoints / checkpoint.name)
    shutil.rmtree(run.branches)
    checkpoint_of_branch, _ = newest_checkpoint(run)
    facts = (
        run_identity(tried.config, tried.setup, train=data.train, held_out=data.eval),
        run_conditions(tried.setup, attention=tried.config.model.attention),
    )
    return go_on(
        run,
        checkpoint_of_branch,
        tried.setup,
        dropout=tried.config.model.has_dropout,
        facts=facts,
    )


def probe_position(config: TrainConfig, rows_per_step: int, data: Data) -> int:
    """Return how many samples each branch sees: whole batches of twice the configured size.

    So all branches see the same samples. Raises ConfigError if these, or the held-out samples, are
    too few to tell settings apart.
    """
    rows, fraction = 2 * rows_per_step, config.probe_fraction
    total_steps = run_length(config, data.train, rows_per_step=rows_per_step).total_steps
    steps = int(fraction * total_steps)
    if steps < FEWEST_STEPS:
        raise ConfigError(
            [
                f"train.probe_fraction {fraction:g} of {total_steps:,} steps is {steps}, and a probe needs "
                f"{FEWEST_STEPS}: set it to {min(FEWEST_STEPS / max(total_steps, 1) + 0.005, 0.5):.2f}, or train longer"
            ]
        )
    if len(data.eval) < FEWEST_EVAL_ROWS:
        raise ConfigError(
            [
                f"train.probe compares on held-out samples, and {len(data.eval)} are too few: give data.eval, or a "
                "larger data.eval_fraction"
            ]
        )
    lengths, position = Epochs.of(data.train.repeats), steps * rows_per_step
    start = lengths.start(lengths.find(position))
    return start + (position - start) // rows * rows


def noise_before_training(
    config: RunConfig, setup: Setup, examples: Examples, *, watcher: Watcher
) -> NoiseEstimate | None:
    """Measure the gradient noise of the untrained weights on the first samples, without a step.

    Returns None if there are too few samples.
    """
    guard = Guard(
        config, setup, examples=examples, report=lambda kind, message: watcher.note(message)
    )
    guard.start()
    rows = batches(
        examples, rows_per_step=config.batch.rows_per_step, seed=config.train.seed, epochs=1
    )
    parts = islice(
        (part for batch in rows for part in setup.layout.split(batch)), NOISE_MICRO_BATCHES
    )
    averages = NoiseAverages()
    while group := list(islice(parts, MICRO_BATCHES_AT_ONCE)):
        norms = guard.read_norms(group, NormRecorder(setup.optimizer))
        sample = (
            None
            if norms is None
            else pairwise_sample(norms.micro, norms.total, weights=norms.weights)
        )
        if sample is not None:
            averages = update_averages(averages, sample, half_life_tokens=math.inf)
    return estimate(averages)


def apply_setting(
    config: RunConfig, setup: Setup, setting: Setting
) -> tuple[RunConfig, OptimSettings, Mapping[str, object]]:
    """Return the setting's configuration, the optimizer's settings, and the keys that differ.

    The optimizer's values are those in use, so optim.scaling is applied already and left out. For
    twice the batch, everything that depends on it is scaled by the rule `sqrt`; micro-batches stay
    the same size.
    """
    optim, content = setup.optim, config.model_dump()
    content["train"] |= {
        "probe": False,
        "probe_fraction": TrainConfig.model_fields["probe_fraction"].default,
    }
    if setting.batch_factor > 1:
        optim = scale(optim, "sqrt", factor=setting.batch_factor)
        rows = config.batch.rows_per_step * setting.batch_factor
        content["batch"] |= {
            "effective": rows,
            "micro": config.batch.micro_rows or "auto",
            "accumulation": "auto",
        }
    optim = replace(optim, lr=setup.optim.lr * setting.lr_factor)
    if setting.lr_factor != 1:
        content["optim"] |= asdict(optim) | {
            "scaling": "none",
            "reference_batch": None,
            "noise_scale": None,
        }
    changed = RunConfig.model_validate(content)
    before = config.model_dump()
    changes = {
        f"{section}.{key}": value
        for section in ("train", "batch", "optim")
        for key, value in changed.model_dump()[section].items()
        if value != before[section][key]
    }
    return changed, optim, changes


def _with_new_optimizer(configured: OptimConfig, setup: Setup, optim: OptimSettings) -> Setup:
    """Return the setup with a new optimizer and a new gradient scaler."""
    device = next(setup.model.parameters()).device
    return replace(
        setup,
        optimizer=build_optimizer(
            setup.model, with_settings(configured, optim), lr=optim.lr, device=device
        ),
        scaler=None if setup.scaler is None else torch.amp.GradScaler(device.type),
        settings=replace(setup.settings, clip=optim.clip),
        optim=optim,
    )


@torch.no_grad()
def _restore_weights(setup: Setup, first: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in live_tensors(setup.model).items():
        tensor.copy_(first[name])


def _difference(
    result: EvalResult | None, configured: EvalResult | None
) -> ConfidenceInterval | None:
    if result is None or configured is None:
        return None
    own, theirs = (
        [
            loss / weight if weight else 0.0
            for loss, weight in zip(each.row_losses, each.row_weights, strict=True)
        ]
        for each in (result, configured)
    )
    return paired_interval(own, theirs, configured.row_weights, level=LEVEL)
