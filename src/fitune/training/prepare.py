"""Loads what a run needs and chooses its plan, with the cheapest ways to find a mistake first.

The order is tokenizer, data, plan, weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.config import ModelConfig, RunConfig, read_config
from fitune.data.batches import Epochs
from fitune.data.chat_template import template_text, today
from fitune.data.examples import Examples, load_examples
from fitune.distributed.processes import Ranks
from fitune.distributed.sharding import check_torch
from fitune.errors import ConfigError, DataError, DoesNotFitError
from fitune.language import say
from fitune.machine.out_of_memory import try_twice
from fitune.machine.process_memory import choose_device, unknown_accelerator
from fitune.model.load import check_length, count_parameters, load_model, load_tokenizer
from fitune.model.lora import not_adapted
from fitune.planning.choices import settings_of_candidate, still_open
from fitune.planning.limits import lengths_of, limits_of
from fitune.planning.optimizer_facts import unusual_rate
from fitune.planning.plan import Plan, closest, does_not_fit, split_of
from fitune.planning.search import choose_plan
from fitune.planning.stated import model_notes
from fitune.step.assemble import Setup, assemble, choose_precision
from fitune.training.answers import cache_note, encode_prompts
from fitune.training.length import Length, run_length
from fitune.training.samples import Data
from fitune.training.self_check import SelfCheck, predict_second_step, reserved_before, run_device
from fitune.units import format_bytes

#: The mean loss of fewer samples depends on which samples they are more than on the training.
FEW_EVAL_ROWS = 20


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its first step."""

    #: what the run follows; None if no plan could be made or an earlier one is followed
    plan: Plan | None
    #: what the plan decides, as overrides of the configuration
    settings: tuple[str, ...]
    setup: Setup
    data: Data
    tokenizer: Tokenizer
    device: torch.device
    num_parameters: int
    num_trainable_parameters: int
    #: the prediction of the second step; None if it could not be made
    self_check: SelfCheck | None
    notes: tuple[str, ...]


def prepare(
    config: RunConfig,
    *,
    on_stage: Callable[[str], None] | None = None,
    plan_check: bool = True,
    settings: Sequence[str] | None = None,
    ranks: Ranks | None = None,
) -> Prepared:
    """Load tokenizer, data and model, and choose a plan.

    on_stage: is called with a text that says what is being done.
    plan_check: refuse a setting that is predicted to need more than memory.budget.
    settings: what an earlier plan decided. It is followed instead of a new plan, as far as the
        configuration leaves it open.
    ranks: the processes that do this together. The first one tokenises and plans for all.

    Raises DoesNotFitError, and the errors of loading.
    """
    ranks = ranks or Ranks()
    if not ranks.leads:
        settings = ranks.exchange(settings)[0]
    report = on_stage or (lambda name: None)
    prepared = _prepare(config, report, plan_check=plan_check, settings=settings, ranks=ranks)
    if ranks.leads:
        ranks.exchange(prepared.settings)
    ranks.exchange(None)  # nothing is written before all processes have loaded what they need
    return prepared


def _prepare(
    config: RunConfig,
    on_stage: Callable[[str], None],
    *,
    plan_check: bool,
    settings: Sequence[str] | None,
    ranks: Ranks,
) -> Prepared:
    device = choose_device()
    check_shard(config.model, num_ranks=ranks.size)
    rows_per_step = config.batch.rows_per_step
    is_sharded = config.model.shard != "none"
    notes = list(_configuration_notes(config, device))
    on_stage(say("reading the data"))
    tokenizer = load_tokenizer(config.model)
    data = load_data(
        config,
        tokenizer,
        on_progress=lambda number: on_stage(
            say("reading the data: {number} samples tokenised", number=f"{number:,}")
        ),
    )
    if config.data.template is not None:
        # It is saved with the model, which answers through no other.
        tokenizer.chat_template = template_text(tokenizer.chat_template, config.data.template)
    data = replace(data, prompts=encode_prompts(config.eval, config.data, tokenizer))
    length = run_length(config.train, data.train, rows_per_step=rows_per_step)
    notes += unseen(length, data.train, rows_per_step=rows_per_step)
    notes += rows_notes(
        num_rows=len(data.train),
        num_held_out=len(data.eval),
        rows_per_step=rows_per_step,
        is_split=config.data.eval is None,
    )
    precision = choose_precision(config.model, device)
    check_length(config.model, config.data.max_length)
    plan = self_check = None
    try:
        if settings is None:
            plan = choose_plan(
                config,
                limits=limits_of(config.memory, run_device(device)),
                lengths=lengths_of(data.train, data.eval),
                search="fastest",
                num_gpus=ranks.size,
                on_stage=on_stage,
            )
            settings, note = follow(plan, config, plan_check=plan_check)
            notes.append(note)
        settings = still_open(settings, config)
        config = read_config(config.model_dump(mode="json", exclude_defaults=True), settings).config
        held_bytes = reserved_before(device)
        if held_bytes:
            notes.append(
                f"memory is not checked: this process already holds {format_bytes(held_bytes)} of the card"
            )
        elif ranks.leads:
            on_stage(say("predicting the memory of the second step"))
            self_check = predict_second_step(
                config, data.train, device=device, num_ranks=ranks.size
            )
    except DoesNotFitError:
        raise
    except Exception as error:
        # A model may fail in any way on tensors without data, and the run does not need this.
        notes.append(
            f"memory is not predicted: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        )
    on_stage(say("loading the model"))
    model = try_twice(
        lambda: load_model(
            config.model,
            device,
            precision=precision,
            seed=config.train.seed,
            stay_on_host=is_sharded,
            notify=notes.append,
        ),
        device=device,
        what=f"the model {config.model.source}",
        way_out="close other programs, or take a smaller model"
        + ("" if config.model.method == "qlora" else " or model.method=qlora"),
    )
    if config.model.has_adapters and (clause := not_adapted(model)) is not None:
        notes.append(clause)
    if data.prompts:
        notes.append(cache_note(data.prompts, num_new_tokens=config.eval.new_tokens, model=model))
    peers = ranks if is_sharded else None
    if peers is not None:
        peers.exchange(None)  # the model is sharded only after all have loaded it
    setup = assemble(model, config, device=device, precision=precision, peers=peers)
    num_parameters, num_trainable = count_parameters(model)
    return Prepared(
        plan,
        tuple(settings or ()),
        setup,
        data,
        tokenizer,
        device,
        num_parameters,
        num_trainable,
        self_check,
        tuple(dict.fromkeys(notes)),
    )


def _configuration_notes(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Yield notes on settings that have no effect or are unusual."""
    if config.memory.allocator and device.type == "cpu":
        yield "memory.allocator has no effect here: it sets CUDA's allocator, and this run is on the CPU"
    if config.memory.gpu is not None:
        yield "memory.gpu is for plans: a run uses the card that is there"
    yield from model_notes(config.model)
    if (note := unknown_accelerator()) is not None:
        yield note
    if (note := unusual_rate(config.optim)) is not None:
        yield note


def rows_notes(
    *, num_rows: int, num_held_out: int, rows_per_step: int, is_split: bool
) -> Iterator[str]:
    """Yield notes on a number of samples with which a batch or an evaluation is not what it seems.

    is_split: whether the held-out samples are a part of the data.
    """
    if rows_per_step > num_rows:
        yield say(
            "batch.effective {batch} is more than the {rows} samples of the data: a step takes all of them, and an "
            "epoch is one step",
            batch=f"{rows_per_step:,}",
            rows=f"{num_rows:,}",
        )
    rows = num_rows + num_held_out
    if is_split and 0 < num_held_out < FEW_EVAL_ROWS and rows >= 2 * FEW_EVAL_ROWS:
        share = min(0.2, 2 * FEW_EVAL_ROWS / rows)
        yield say(
            "{held} of {rows} samples are held out, and an evaluation of so few says little: "
            "data.eval_fraction={share} holds out about {more}",
            held=f"{num_held_out:,}",
            rows=f"{rows:,}",
            share=f"{share:.2g}",
            more=f"{round(share * rows):,}",
        )


def check_shard(model: ModelConfig, *, num_ranks: int) -> None:
    """Raise ConfigError if this number of processes cannot do what model.shard asks for."""
    if model.shard == "none":
        return
    if num_ranks == 1:
        raise ConfigError(
            [
                "model.shard=full shards the weights over processes and this is one alone: start two or more with "
                "torchrun --nproc_per_node 2, or drop it"
            ]
        )
    check_torch()


def follow(plan: Plan, config: RunConfig, *, plan_check: bool = True) -> tuple[list[str], str]:
    """Return the plan's choice as overrides of the configuration, and a message about it.

    If nothing fits, the closest candidate runs if `plan_check` is off, or if no budget was given
    and it only exceeds the fraction of the free memory that is not planned for. Otherwise
    DoesNotFitError is raised.
    """
    if plan.chosen is not None:
        chosen = plan.candidates[plan.chosen]
        limit = f"of {format_bytes(plan.limit_bytes)}"
        limit += ", an upper bound: it may run out of memory" if chosen.fits is None else ""
    else:
        chosen = closest(plan)
        tight = (
            config.memory.budget == "auto"
            and chosen.predicted_device_bytes <= plan.device.free_bytes
        )
        if plan_check and not tight:
            raise DoesNotFitError(f"{does_not_fit(plan)}; --no-plan-check runs it anyway")
        limit = f"of {format_bytes(plan.limit_bytes)}: it may run out of memory"
    return settings_of_candidate(chosen, config), (
        f"plan: {split_of(plan, chosen).sentence}, gradient checkpointing {', '.join(chosen.techniques)}, "
        f"{chosen.loss} loss: "
        f"{format_bytes(chosen.predicted_device_bytes)} in all {limit}"
    )


def unseen(length: Length, examples: Examples, *, rows_per_step: int) -> list[str]:
    """Return a warning for each weight of data.train that is too small for any of its samples."""
    lengths = Epochs.of(examples.repeats)
    epochs = length.epochs or length.total_steps * rows_per_step / float(lengths.mean_samples)
    values, counts = np.unique(examples.repeats, return_counts=True)
    return [
        f"warning: none of the {count:,} samples with weight {weight:g} is seen in {epochs:.3g} epochs: at weight "
        f"{0.5 / (epochs * count):.2g} one would be"
        for (group, weight, count) in zip(lengths.groups, values, counts, strict=True)
        if not Epochs((group,)).num_samples(epochs)
    ]


def load_data(
    config: RunConfig, tokenizer: Tokenizer, *, on_progress: Callable[[int], None] | None = None
) -> Data:
    """Load the training and the held-out samples, with one date for both if the template needs it.

    Raises DataError if no sample is left to train on.
    """
    if config.data.date is None:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"date": today().isoformat()})}
        )
    train = load_examples(
        config.data,
        tokenizer,
        split="train",
        eval_max_rows=config.eval.max_rows,
        kind=config.sample_kind,
        on_progress=on_progress,
    )
    held_out = load_examples(
        config.data,
        tokenizer,
        split="eval",
        eval_max_rows=config.eval.max_rows,
        kind=config.sample_kind,
    )
    if not len(train):
        raise DataError(
            f"{config.data.train_sources[0].path} leaves no sample to train on after holding out {len(held_out)}: "
            "give more samples, or set data.eval_fraction=0"
        )
    return Data(train, held_out)
