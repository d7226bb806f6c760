"""A plan: the settings that were looked at, what each would need, and the one that was chosen. Pure data."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fitune.display import HtmlDisplay
from fitune.language import say
from fitune.planning.limits import AUTO_SHARE
from fitune.planning.optimizer_facts import PlannedTraining
from fitune.trace.events import COMPILED, ROUTED, UNROUTED, VERSIONS, Category
from fitune.units import format_bytes

ADAMW_HOST = "adamw_host"
CODE_IGNORED = "code that comes with"
NOT_PACKED = "qlora:"
UNPACKED = "weights stored as"
SHOWN = (*ROUTED.values(), UNROUTED, "memory.routing=", CODE_IGNORED, NOT_PACKED, UNPACKED, COMPILED, VERSIONS)
"""Begins those assumptions that the table of a plan shows; its JSON holds all."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting and its prediction. micro_batch: rows of the longest length in one forward and backward.
    micro_tokens: the token budget of a micro-batch, None where rows are counted. accumulation: micro-batches of the
    mean step. predicted_seconds_per_step: of the mean step, None where it is not predicted. fits: None where
    what is predicted is an upper bound (model.compile) that exceeds the budget. reason: why it does not fit, or on what
    condition it does; empty otherwise. result: what it does to what is learnt beside the configuration:
    same, close, or different. predicted_host_bytes: what a card's run keeps in the host's memory by a technique; pinned
    blocks are rounded up to powers of two there, so up to twice as much is taken."""

    micro_batch: int
    micro_tokens: int | None
    accumulation: int
    recompute: str
    loss: str
    optimizer: str
    precision: str
    method: str
    attention: str
    packing: bool
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int
    predicted_device_bytes: int
    categories: Mapping[Category, int]
    peak_phase: str
    predicted_seconds_per_step: float | None = None
    fits: bool | None
    reason: str = ""
    result: str = "same"
    offload_activations: bool = False
    predicted_host_bytes: int = 0

    @property
    def techniques(self) -> tuple[str, ...]:
        """What it does for memory that leaves the result the same: how it recomputes, and what the host holds."""
        offloads = ("offload",) if self.offload_activations else ()
        return self.recompute, *offloads, *((self.optimizer,) if self.optimizer == ADAMW_HOST else ())


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """name: its source, as configured."""

    name: str
    num_parameters: int
    num_trainable_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """free_bytes: of a card that is not here, all of it. context_bytes: what the process holds outside PyTorch."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    free_bytes: int
    context_bytes: int


@dataclass(frozen=True, kw_only=True)
class OtherEstimate:
    """What another estimator says of a quantity: num_bytes beside our predicted_bytes."""

    name: str
    quantity: str
    num_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, kw_only=True)
class FirstAnswer:
    """Whether a setting fits, told before the rest is planned. is_configured: whether it is the configuration's own.
    sizes: its micro-batches, as `sizes_of` has them."""

    is_configured: bool
    sizes: "Sizes"
    recompute: str
    device_bytes: int
    limit_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan(HtmlDisplay):
    """data: what is known of the rows (`planner`). training: what is asked of the optimizer. candidates: by predicted
    time, the fastest first. chosen: an index, None if nothing fits. configured: the index of the setting that the
    configuration itself gives, None where it leaves the micro-batch open. others: what other estimators say for the
    chosen candidate, or the closest. assumptions: what the predictions rest on, one sentence each."""

    model: PlannedModel
    device: PlannedDevice
    budget_bytes: int
    data: Mapping[str, Any]
    training: PlannedTraining
    candidates: tuple[Candidate, ...]
    chosen: int | None
    configured: int | None = None
    others: tuple[OtherEstimate, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def limit_bytes(self) -> int:
        """The budget, or what the device has free where that is less."""
        return min(self.budget_bytes, self.device.free_bytes)

    def __repr__(self) -> str:
        """In a sentence; the fields hold all of it."""
        if self.chosen is None:
            return f"Plan: {does_not_fit(self)}"
        chosen = self.candidates[self.chosen]
        return say(
            "Plan: {split}, gradient checkpointing {recompute}: {needed} of {budget}; {number} candidates",
            split=split_of(self, chosen).sentence,
            recompute=", ".join(chosen.techniques),
            needed=format_bytes(chosen.predicted_device_bytes),
            budget=format_bytes(self.limit_bytes),
            number=len(self.candidates),
        )


def plan_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def closest(plan: Plan) -> Candidate:
    """The candidate with the same result that needs the least memory."""
    same = (candidate for candidate in plan.candidates if candidate.result == "same")
    return min(same, key=lambda candidate: candidate.predicted_device_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How the samples of an optimizer step are cut into micro-batches on one device. tokens: of a micro-batch at most,
    where samples differ in length; None where samples are counted. rest: samples of the last micro-batch where it is
    smaller than the others, else 0."""

    micro_batch: int
    accumulation: int
    rest: int = 0
    tokens: int | None = None

    @property
    def product(self) -> str:
        """'6 x 4', for 16 samples '6 + 6 + 4', for many '6 x 20 + 4'; '8,192 tokens x 3'."""
        if self.tokens is not None:
            return say("{tokens} tokens x {accumulation}", tokens=f"{self.tokens:,}", accumulation=self.accumulation)
        if not self.rest:
            return f"{self.micro_batch} x {self.accumulation}"
        whole = self.accumulation - 1
        if whole < _MOST_SUMMANDS:
            return " + ".join(map(str, (*[self.micro_batch] * whole, self.rest)))
        return f"{self.micro_batch} x {whole} + {self.rest}"

    @property
    def sentence(self) -> str:
        """'micro-batch 6, accumulation 4', 'micro-batches of 6 + 6 + 4 samples'."""
        if self.tokens is not None:
            return say(
                "micro-batch of {tokens} tokens, accumulation {accumulation}",
                tokens=f"{self.tokens:,}",
                accumulation=self.accumulation,
            )
        if self.rest:
            return say("micro-batches of {sizes} samples", sizes=self.product)
        return say(
            "micro-batch {size}, accumulation {accumulation}", size=self.micro_batch, accumulation=self.accumulation
        )


_MOST_SUMMANDS = 5
"""That are written one by one."""


def sizes_of(
    micro_batch: int, micro_tokens: int | None, accumulation: int, *, num_samples: int, is_uniform: bool
) -> Sizes:
    """num_samples: of an optimizer step on one device. is_uniform: whether all samples are equally long, so that tokens
    are samples."""
    if micro_tokens is not None and not is_uniform:
        return Sizes(micro_batch=micro_batch, accumulation=accumulation, tokens=micro_tokens)
    rest = num_samples % micro_batch if micro_batch < num_samples else 0
    return Sizes(micro_batch=micro_batch, accumulation=-(-num_samples // micro_batch), rest=rest)


def split_of(plan: Plan, candidate: Candidate) -> Sizes:
    return sizes_of(
        candidate.micro_batch,
        candidate.micro_tokens,
        candidate.accumulation,
        num_samples=-(-plan.data["effective_batch"] // plan.data["gpus"]),
        is_uniform=plan.data["mean_row_tokens"] == plan.data["row_tokens"],
    )


def does_not_fit(plan: Plan) -> str:
    """What does not fit, the closest candidate, its largest parts, and what would make room."""
    nearest = closest(plan)
    parts = sorted(nearest.categories.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[:4] if size)
    return (
        f"no plan fits {format_bytes(plan.limit_bytes)} on {plan.device.name}: the closest candidate "
        f"({split_of(plan, nearest).sentence}, gradient checkpointing {', '.join(nearest.techniques)}) needs "
        f"{format_bytes(nearest.predicted_device_bytes)} ({named}). Try {' or '.join(_ways_out(plan, nearest))}"
    )


def _ways_out(plan: Plan, nearest: Candidate) -> Iterator[str]:
    same = (candidate for candidate in plan.candidates if candidate.result == "same")
    configured = next((each.optimizer for each in same if each.optimizer != ADAMW_HOST), ADAMW_HOST)
    for candidate in plan.candidates:
        if candidate.result != "same" and candidate.fits:
            changed = (
                ("optim.name", candidate.optimizer, configured),
                ("model.method", candidate.method, nearest.method),
                (
                    "model.precision",
                    candidate.precision,
                    nearest.precision if candidate.method == nearest.method else None,
                ),
            )
            names = [f"{key}={value}" for key, value, present in changed if present and value != present]
            yield f"{' '.join(names)} ({format_bytes(candidate.predicted_device_bytes)})"
    largest = max(nearest.categories, key=lambda name: nearest.categories[name])
    if largest in ("activation", "temporary", "input"):
        if nearest.recompute != "full":
            yield "model.recompute=full"
        if nearest.micro_batch > 1:
            yield "a smaller batch.micro"
        yield f"data.max_length={plan.data['max_length'] // 2}"
    else:
        yield "a smaller model"
    if nearest.predicted_device_bytes <= plan.device.free_bytes:
        yield f"a memory.budget of {format_bytes(nearest.predicted_device_bytes)}"
    else:  # of a card, too, the budget is a share
        share = min(1.0, max(AUTO_SHARE, plan.budget_bytes / plan.device.free_bytes))
        yield f"a card with {format_bytes(math.ceil(nearest.predicted_device_bytes / share))}"
