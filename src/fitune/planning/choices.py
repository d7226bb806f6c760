"""The settings that a plan looks at, as changes of a configuration.

The rows of an optimizer step stay as configured: how they are cut into micro-batches, what is kept for the backward and
how the loss is formed leave the result the same, so these are varied. What would change it is proposed beside them,
never chosen. What the configuration forces is not varied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fitune.config import BatchConfig, Loss, Precision, Recompute, Routing, RunConfig
from fitune.optimizers.table import OPTIMIZERS
from fitune.planning.limits import Lengths
from fitune.planning.plan import ADAMW_HOST, Candidate

Result = Literal["same", "close", "different"]
MOST_MICRO_TOKENS = 65536
"""No card gets faster above; a larger micro-batch is never proposed."""
RECOMPUTES: tuple[Recompute, ...] = ("off", "every_4", "selective", "every_2", "full")
"""From the fastest and largest to the slowest and smallest, roughly."""
_LEAST_GROWTH = 1.2
"""Between two numbers of rows: nearer ones tell nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of micro_rows and micro_tokens. method, optimizer, precision: None as configured. offloads: whether inputs of
    recomputed layers go to the host though that is not configured. result: what it does to what is learnt. num_changes:
    how many settings differ from the simplest."""

    micro_rows: int | None
    micro_tokens: int | None
    recompute: Recompute
    loss: Loss
    method: str | None = None
    optimizer: str | None = None
    precision: Precision | None = None
    offloads: bool = False
    result: Result = "same"

    @property
    def num_changes(self) -> int:
        changed = (self.recompute != "off", self.loss != "chunked", self.offloads, self.method, self.optimizer)
        return sum(map(bool, (*changed, self.precision)))

    @property
    def variant(self) -> "Choice":
        """The same but for its size."""
        return replace(self, micro_rows=None, micro_tokens=None)


def same_choices(config: RunConfig, lengths: Lengths, *, on_card: bool) -> Iterator[Choice]:
    """The settings that leave the result the same, from few changes to many. Full logits, which never need less
    memory, are looked at without recomputation only; what recomputing starts from goes to the host of a card where all
    layers recompute, which needs the least."""
    recomputes = RECOMPUTES if config.model.recompute == "auto" else (config.model.recompute,)
    losses: tuple[Loss, ...] = ("chunked", "full") if config.loss == "auto" else (config.loss,)
    sizes = micro_sizes(config, lengths)
    for recompute in recomputes:
        for loss in losses:
            if loss == losses[0] or recompute == recomputes[0]:
                for rows, tokens in sizes:
                    yield Choice(micro_rows=rows, micro_tokens=tokens, recompute=recompute, loss=loss)
    model = config.model
    if (
        on_card
        and model.recompute == "auto"
        and model.shard == "none"
        and "offload_activations" not in model.model_fields_set
    ):
        for rows, tokens in sizes:
            yield Choice(micro_rows=rows, micro_tokens=tokens, recompute="full", loss=losses[0], offloads=True)


def host_choices(config: RunConfig, choices: Sequence[Choice]) -> list[Choice]:
    """`choices` with AdamW's state and update on the host of the card. None where the optimizer is another or trains an
    adapter, whose state is small."""
    if config.optim.name != "adamw" or config.model.method != "full" or config.model.shard != "none":
        return []
    return [replace(choice, optimizer=ADAMW_HOST) for choice in choices if choice.loss == choices[0].loss]


def proposals(config: RunConfig, choice: Choice, *, float32: bool) -> Iterator[Choice]:
    """What would need less memory or time beside `choice` and is for the user to decide. float32: whether the model
    computes in float32 though the device has bfloat16."""
    is_sharded = config.model.shard != "none"  # which leaves some out
    if config.optim.name in ("adamw", "adamw_foreach") and not is_sharded:
        for name, kind in OPTIMIZERS.items():
            if kind.is_proposed:
                yield replace(choice, optimizer=name, result=kind.result)
    if float32:
        yield replace(choice, precision="autocast_bfloat16", result="close")
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(config.model.method, ()):
        if method == "qlora" and is_sharded:
            continue
        yield replace(choice, method=method, optimizer=None, result="different")


def micro_sizes(config: RunConfig, lengths: Lengths) -> list[tuple[int | None, int | None]]:
    """(rows, tokens) of a micro-batch, one of the two, ascending.

    Rows of one length: the fewest rows for each number of micro-batches that a step can have, so 24 rows are cut into
    24, 12, 8, 6, 5, 4, 3, 2 and 1 at a time. Others: 1, 1.5, 2, 3, 4, 6, 8, ... times the longest row, up to the whole
    step: whole rows, so that two recordings tell of all the others.
    """
    batch = config.batch
    if batch.micro_rows is not None:
        return [(min(batch.micro_rows, batch.rows_per_step), None)]
    if batch.micro_tokens != "auto":
        return [(None, batch.micro_tokens)]
    longest = lengths.longest_tokens
    if len(set(lengths.sample_tokens)) == 1:
        rows = [1]
        for size in sorted({-(-batch.rows_per_step // count) for count in range(1, batch.rows_per_step + 1)}):
            if size >= _LEAST_GROWTH * rows[-1] and size * longest <= MOST_MICRO_TOKENS:
                rows.append(size)
        return [(None, size * longest) for size in rows]
    halves, whole = [2, 3], 1.5 * lengths.mean_tokens * batch.rows_per_step
    while halves[-2] * longest < 2 * min(whole, MOST_MICRO_TOKENS):
        halves.append(2 * halves[-2])
    return [(None, half * longest // 2) for half in halves[:-1]]


def settle(config: RunConfig, choice: Choice) -> RunConfig:
    """The configuration with the choice written into it. A chunked loss that is not forced stays `auto`: a model
    without a separate head then takes full logits."""
    model: dict[str, Any] = {"recompute": choice.recompute}
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
    return config.model_copy(update={"memory": config.memory.model_copy(update={"routing": routing})})


def settings_of_candidate(candidate: Candidate, config: RunConfig) -> list[str]:
    """As overrides of the configuration; what it forces already is left out."""
    batch = config.batch
    settings = {
        "model.recompute": candidate.recompute if config.model.recompute == "auto" else None,
        "model.method": candidate.method if candidate.method != config.model.method else None,
        "model.offload_activations": "true"
        if candidate.offload_activations and not config.model.offload_activations
        else None,
        "model.precision": candidate.precision if config.model.precision not in ("auto", candidate.precision) else None,
        "loss": candidate.loss if config.loss == "auto" else None,
        "optim.name": candidate.optimizer if candidate.optimizer != config.optim.name else None,
    }
    if batch.micro_rows is None and batch.micro_tokens == "auto":
        settings["batch.micro_tokens"] = str(candidate.micro_tokens)
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def still_open(settings: Iterable[str], config: RunConfig) -> list[str]:
    """Of the overrides that a plan once gave, those that the configuration, which may be another now, leaves open."""
    batch = config.batch
    is_open = {
        "model.recompute": config.model.recompute == "auto",
        "model.offload_activations": config.model.recompute == "auto",
        "optim.name": config.optim.name == "adamw",
        "model.precision": config.model.precision == "auto",
        "loss": config.loss == "auto",
        "batch.micro_tokens": batch.micro_rows is None and batch.micro_tokens == "auto",
    }
    return [setting for setting in settings if is_open.get(setting.partition("=")[0], False)]
