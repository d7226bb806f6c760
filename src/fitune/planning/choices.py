"""Lists the settings that a plan considers, as changes of a configuration.

The samples of an optimizer step are always those of the configuration. A plan varies how they are
split into micro-batches, which activations are saved for the backward, and how the loss is
computed: none of these changes the training result. Settings that would change the result are
proposed but never chosen. Settings that the configuration forces are not varied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fitune.config import (
    BatchConfig,
    Loss,
    ModelConfig,
    OptimConfig,
    Precision,
    Recompute,
    Routing,
    RunConfig,
)
from fitune.optimizers.table import OPTIMIZERS
from fitune.planning.limits import Lengths
from fitune.planning.plan import ADAMW_HOST, Candidate

Result = Literal["same", "close", "different"]
#: no card is faster with more tokens at once, so a larger micro-batch is never proposed
MOST_MICRO_TOKENS = 65536
#: roughly from the fastest, which needs the most memory, to the slowest, which needs the least
RECOMPUTES: tuple[Recompute, ...] = ("off", "every_4", "selective", "every_2", "full")
#: between the sizes of two micro-batches that are considered: nearer ones differ too little
_LEAST_GROWTH = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setting that a plan considers."""

    #: the samples or the tokens of a micro-batch; the other one is None
    micro_rows: int | None
    micro_tokens: int | None
    recompute: Recompute
    loss: Loss
    #: None for the configured one
    method: str | None = None
    #: None for the configured one
    optimizer: str | None = None
    #: None for the configured one
    precision: Precision | None = None
    #: whether the inputs of checkpointed layers are offloaded to the host without being configured
    offloads: bool = False
    #: how the training result compares with that of the configuration
    result: Result = "same"

    @property
    def num_changes(self) -> int:
        """The number of settings that differ from the simplest."""
        changed = (
            self.recompute != "off",
            self.loss != "chunked",
            self.offloads,
            self.method,
            self.optimizer,
        )
        return sum(map(bool, (*changed, self.precision)))

    @property
    def variant(self) -> "Choice":
        """The setting without the size of its micro-batch."""
        return replace(self, micro_rows=None, micro_tokens=None)


def same_choices(config: RunConfig, lengths: Lengths, *, on_card: bool) -> Iterator[Choice]:
    """Yield the settings that do not change the result, from few changes to many.

    Full logits, which never need less memory than a chunked loss, are considered without gradient
    checkpointing only. Offloading the inputs of checkpointed layers to the host is considered on a
    card with all layers checkpointed, which needs the least memory.
    """
    recomputes = RECOMPUTES if config.model.recompute == "auto" else (config.model.recompute,)
    losses: tuple[Loss, ...] = ("chunked", "full") if config.loss == "auto" else (config.loss,)
    sizes = micro_sizes(config.batch, lengths)
    for recompute in recomputes:
        for loss in losses:
            if loss == losses[0] or recompute == recomputes[0]:
                for rows, tokens in sizes:
                    yield Choice(
                        micro_rows=rows, micro_tokens=tokens, recompute=recompute, loss=loss
                    )
    model = config.model
    if (
        on_card
        and model.recompute == "auto"
        and model.shard == "none"
        and "offload_activations" not in model.model_fields_set
    ):
        for rows, tokens in sizes:
            yield Choice(
                micro_rows=rows,
                micro_tokens=tokens,
                recompute="full",
                loss=losses[0],
                offloads=True,
            )


def open_part(
    wanted: Choice, choices: Sequence[Choice], batch: BatchConfig, lengths: Lengths
) -> Choice:
    """Return the setting that is most like `wanted` among those that the configuration allows.

    choices: those of `same_choices`. wanted.micro_rows: samples of the longest length.
    """
    alike = [
        choice
        for choice in choices
        if (choice.recompute, choice.loss, choice.offloads)
        == (wanted.recompute, wanted.loss, wanted.offloads)
    ] or choices
    if not batch.is_micro_open or wanted.micro_rows is None:
        return alike[0]
    rows = min(wanted.micro_rows, batch.rows_per_step)
    return replace(alike[0], micro_rows=None, micro_tokens=rows * lengths.longest_tokens)


def host_choices(model: ModelConfig, optim: OptimConfig, choices: Sequence[Choice]) -> list[Choice]:
    """Return `choices` with AdamW's state and update on the host.

    Returns an empty list for another optimizer, and for adapters, whose state is small.
    """
    if optim.name != "adamw" or model.method != "full" or model.shard != "none":
        return []
    return [
        replace(choice, optimizer=ADAMW_HOST)
        for choice in choices
        if choice.loss == choices[0].loss
    ]


def proposals(
    model: ModelConfig, optim: OptimConfig, choice: Choice, *, float32: bool
) -> Iterator[Choice]:
    """Yield variants of `choice` that need less memory or time but change the result.

    The user decides on them. float32: whether the model computes in float32 though the device has
    bfloat16.
    """
    is_sharded = model.shard != "none"  # not every variant can be sharded
    if optim.name in ("adamw", "adamw_foreach") and not is_sharded:
        for name, kind in OPTIMIZERS.items():
            if kind.is_proposed:
                yield replace(choice, optimizer=name, result=kind.result)
    if float32:
        yield replace(choice, precision="autocast_bfloat16", result="close")
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(model.method, ()):
        if method == "qlora" and is_sharded:
            continue
        yield replace(choice, method=method, optimizer=None, result="different")


def micro_sizes(batch: BatchConfig, lengths: Lengths) -> list[tuple[int | None, int | None]]:
    """Return the sizes of micro-batches to consider, ascending.

    A size is (samples, None) or (None, tokens). If all samples have one length, there is a size
    for each number of micro-batches that a step can have, the smallest that gives this number: 24
    samples are split into 24, 12, 8, 6, 5, 4, 3, 2 and 1 at a time. Else the sizes are 1, 1.5, 2,
    3, 4, 6, 8, ... times the longest sample, up to the whole step. They are multiples of half a
    sample, so that the work of all sizes follows from two recordings.
    """
    if batch.micro_rows is not None:
        return [(min(batch.micro_rows, batch.rows_per_step), None)]
    if batch.micro_tokens != "auto":
        return [(None, batch.micro_tokens)]
    longest = lengths.longest_tokens
    if len(set(lengths.sample_tokens)) == 1:
        rows = [1]
        for size in sorted(
            {-(-batch.rows_per_step // count) for count in range(1, batch.rows_per_step + 1)}
        ):
            if size >= _LEAST_GROWTH * rows[-1] and size * longest <= MOST_MICRO_TOKENS:
                rows.append(size)
        return [(None, size * longest) for size in rows]
    halves, whole = [2, 3], 1.5 * lengths.mean_tokens * batch.rows_per_step
    while halves[-2] * longest < 2 * min(whole, MOST_MICRO_TOKENS):
        halves.append(2 * halves[-2])
    return [(None, half * longest // 2) for half in halves[:-1]]


def apply_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """Return the configuration with the settings of the choice.

    A chunked loss that is not forced remains `auto`, because a model without a separate head then
    computes full logits.
    """
    model: dict[str, object] = {"recompute": choice.recompute}
    if choice.method is not None:
        model["method"] = choice.method
    if choice.precision is not None:
        model["precision"] = choice.precision
    if choice.offloads:
        model["offload_activations"] = True
    batch = BatchConfig(
        effective=config.batch.rows_per_step,
        micro=choice.micro_rows or "auto",
        micro_tokens=choice.micro_tokens or "auto",
    )
    optim = {} if choice.optimizer is None else {"name": choice.optimizer}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "batch": batch,
            "optim": config.optim.model_copy(update=optim),
            "loss": "auto" if config.loss == "auto" and choice.loss == "chunked" else choice.loss,
        }
    )


def with_routing(config: RunConfig, routing: Routing) -> RunConfig:
    return config.model_copy(
        update={"memory": config.memory.model_copy(update={"routing": routing})}
    )


def settings_of_candidate(candidate: Candidate, config: RunConfig) -> list[str]:
    """Return the settings of a candidate as overrides of the configuration.

    Settings that the configuration has already are left out.
    """
    batch, model = config.batch, config.model
    offloads = candidate.offload_activations and not model.offload_activations
    is_other_precision = model.precision not in ("auto", candidate.precision)
    settings = {
        "model.recompute": candidate.recompute if model.recompute == "auto" else None,
        "model.method": candidate.method if candidate.method != model.method else None,
        "model.offload_activations": "true" if offloads else None,
        "model.precision": candidate.precision if is_other_precision else None,
        "loss": candidate.loss if config.loss == "auto" else None,
        "optim.name": candidate.optimizer if candidate.optimizer != config.optim.name else None,
    }
    if batch.is_micro_open:
        settings["batch.micro_tokens"] = str(candidate.micro_tokens)
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def still_open(settings: Iterable[str], config: RunConfig) -> list[str]:
    """Return those overrides of an earlier plan that the configuration leaves open.

    The configuration may have changed since that plan.
    """
    is_open = {
        "model.recompute": config.model.recompute == "auto",
        "model.offload_activations": config.model.recompute == "auto",
        "optim.name": config.optim.name == "adamw",
        "model.precision": config.model.precision == "auto",
        "loss": config.loss == "auto",
        "batch.micro_tokens": config.batch.is_micro_open,
    }
    return [setting for setting in settings if is_open.get(setting.partition("=")[0], False)]
