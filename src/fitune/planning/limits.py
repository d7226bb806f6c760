"""Finds the limits of a plan: the memory that it may use, and the lengths of the samples."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fitune.config import MemoryConfig, RunConfig
from fitune.errors import ModelError, UsageError
from fitune.machine.cards import Device, context_prior
from fitune.machine.devices import cpu_device, find_device, this_machine
from fitune.model.source import source_kind
from fitune.planning.cache import cached, file_state
from fitune.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from fitune.data.examples import Examples

#: the fraction of the free memory that is used if no budget is given: the rest is for other
#: processes and for the uncertainty of the CUDA context
AUTO_SHARE = 0.9
#: the value of data.train if a plan is made for a model without data
NO_DATA = "none"
#: the most samples whose lengths are stored
SAMPLED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of the samples, in tokens."""

    #: ascending: at most SAMPLED_ROWS lengths, evenly spaced in rank, the longest always included
    sample_tokens: tuple[int, ...]
    #: the fraction of all tokens that are targets
    supervised_fraction: float
    #: 0 where nothing is evaluated
    longest_eval_tokens: int
    #: None where the data is not known
    epoch_rows: int | None
    #: None where the data is not known
    epoch_tokens: int | None
    #: where the longest length is from, as text
    origin: str

    @property
    def longest_tokens(self) -> int:
        return self.sample_tokens[-1]

    @property
    def mean_tokens(self) -> float:
        if self.epoch_tokens is not None and self.epoch_rows:
            return self.epoch_tokens / self.epoch_rows
        return sum(self.sample_tokens) / len(self.sample_tokens)


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """A device, and the memory that a run may use on it."""

    device: Device
    budget_bytes: int
    #: whether the configuration gives the budget
    given: bool
    #: the part of the budget that is reserved for what is not predicted step by step
    kept_bytes: int = 0
    #: the free memory of the host; None if the card is not in this machine
    host_bytes: int | None = None

    @property
    def limit_bytes(self) -> int:
        """The most bytes that the process may use on the device, its CUDA context included."""
        return min(self.budget_bytes, free_bytes(self.device)) - self.kept_bytes


def find_limits(memory: MemoryConfig, *, gpu: str | None = None) -> MemoryLimits:
    """Return the device and the memory that a run of the configuration may use.

    gpu: a card of the catalogue, or 'cpu'. None for memory.gpu, else this machine's card, else its
        CPU. If there is no card and memory.budget is a size, then any card with so much memory.

    Raises UsageError for an unknown card.
    """
    named, budget = gpu or memory.gpu, memory.budget
    size = parse_bytes(budget) if isinstance(budget, str) and budget != "auto" else None
    if named is not None:
        device = find_device(named)
    elif cards := this_machine():
        device = cards[0]
    else:
        device = cpu_device() if size is None else _any_card(size)
    return limits_of(memory, device)


def limits_of(memory: MemoryConfig, device: Device) -> MemoryLimits:
    is_here = device.kind == "cuda" and device.free_bytes is not None
    return MemoryLimits(
        device,
        budget_bytes(memory.budget, device),
        memory.budget != "auto",
        host_bytes=free_bytes(cpu_device()) if is_here else None,
    )


def budget_bytes(budget: str | float, device: Device) -> int:
    """Return the bytes of memory.budget on that device; auto is a fraction of what is free now."""
    if isinstance(budget, str) and budget != "auto":
        return parse_bytes(budget)
    return int((AUTO_SHARE if isinstance(budget, str) else budget) * free_bytes(device))


def free_bytes(device: Device) -> int:
    """Return the free memory of the device; for a card that is not in this machine, all of it."""
    return device.total_bytes if device.free_bytes is None else device.free_bytes


def find_lengths(config: RunConfig) -> Lengths:
    """Return the lengths of the data; if it cannot be read here, all are data.max_length."""
    sources = config.data.train_sources
    paths = [
        Path(source.path.partition("#")[0]).expanduser()
        for source in (*sources, *(config.data.eval_sources or ()))
    ]
    if not all(path.exists() for path in paths):
        is_named = config.data.train != NO_DATA
        return uniform_lengths(
            config, origin="data.max_length, as the data is not here" if is_named else None
        )
    tokenizer = config.model.tokenizer or config.model.source
    key = [
        config.data.model_dump(mode="json"),
        config.sample_kind,
        config.eval.max_rows,
        tokenizer,
        file_state(tokenizer),
        *map(file_state, paths),
    ]
    found = cached("plans", ["lengths", key], lambda: asdict(_read_lengths(config)))
    return Lengths(**found | {"sample_tokens": tuple(found["sample_tokens"])})


def uniform_lengths(config: RunConfig, *, origin: str | None = None) -> Lengths:
    length = config.sample_tokens
    eval_length = length if config.data.is_evaluated else 0
    if origin is None:
        of_pairs = "twice data.max_length, as a pair has two answers"
        origin = of_pairs if config.sample_kind == "pair" else "data.max_length"
    return Lengths((length,), 1.0, eval_length, None, None, origin)


def lengths_of(train: "Examples", held_out: "Examples") -> Lengths:
    """Return the lengths of these data. train must contain at least one sample."""
    ordered = sorted(train.lengths.tolist())
    step = max(1, -(-len(ordered) // SAMPLED_ROWS))
    repeats = train.repeats.astype("float64")
    return Lengths(
        sample_tokens=tuple(reversed(ordered[::-1][::step])),
        supervised_fraction=train.num_supervised_tokens / max(train.num_tokens, 1),
        longest_eval_tokens=int(held_out.lengths.max()) if len(held_out) else 0,
        epoch_rows=round(float(repeats.sum())),
        epoch_tokens=round(float((train.lengths * repeats).sum())),
        origin="the longest sample of the data",
    )


def _read_lengths(config: RunConfig) -> Lengths:
    from fitune.data.examples import load_examples
    from fitune.model.load import load_tokenizer

    try:
        if source_kind(config.model.tokenizer or config.model.source) != "hub":
            tokenizer = load_tokenizer(config.model)
            train = load_examples(
                config.data,
                tokenizer,
                split="train",
                eval_max_rows=config.eval.max_rows,
                kind=config.sample_kind,
            )
            held_out = load_examples(
                config.data,
                tokenizer,
                split="eval",
                eval_max_rows=config.eval.max_rows,
                kind=config.sample_kind,
            )
            if not len(train):
                return uniform_lengths(
                    config, origin="data.max_length, as the data has no samples to train on"
                )
            return lengths_of(train, held_out)
    except ModelError:
        return uniform_lengths(
            config,
            origin="data.max_length, as the model has no tokenizer to read the data with",
        )
    except UsageError:
        # a plan does not need the data; `fitune check` and `fitune train` say what is wrong with it
        return uniform_lengths(config, origin="data.max_length, as the data cannot be read")
    return uniform_lengths(config, origin="data.max_length, as the tokenizer is not here")


def _any_card(num_bytes: int) -> Device:
    card = find_device("A100 40GB")
    return replace(
        card,
        name=f"any card of {format_bytes(num_bytes)}",
        box_bytes=num_bytes,
        total_bytes=num_bytes,
        context=context_prior((8, 0)),
    )
