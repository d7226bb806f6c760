"""Defines a plan: the settings that were considered, what each needs, and the one that was chosen.

A plan is pure data; `planning/search.py` makes it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fitune.display import HtmlDisplay
from fitune.language import say
from fitune.planning.limits import AUTO_SHARE
from fitune.planning.optimizer_facts import PlannedTraining
from fitune.recorder.events import COMPILED, ROUTED, UNROUTED, VERSIONS, Category
from fitune.units import format_bytes

ADAMW_HOST = "adamw_host"
CODE_IGNORED = "code that comes with"
NOT_PACKED = "qlora:"
UNPACKED = "weights stored as"
COMPILING = "model.compile=true "
REFERENCE = "reference: "
#: the beginnings of the assumptions that the table of a plan shows; its JSON contains all
SHOWN = (
    *ROUTED.values(),
    UNROUTED,
    "memory.routing=",
    CODE_IGNORED,
    NOT_PACKED,
    UNPACKED,
    COMPILED,
    COMPILING,
    REFERENCE,
    VERSIONS,
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A setting and its prediction."""

    #: samples of the longest length in one forward and backward
    micro_batch: int
    #: the most tokens of a micro-batch; None where samples are counted
    micro_tokens: int | None
    #: micro-batches of the mean step
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
    #: of the mean step; None where it is not predicted
    predicted_seconds_per_step: float | None = None
    #: None where the prediction is an upper bound (model.compile) that exceeds the budget
    fits: bool | None
    #: why it does not fit, or on what condition it fits; otherwise empty
    reason: str = ""
    #: how the training result compares with that of the configuration: same, close or different
    result: str = "same"
    offload_activations: bool = False
    #: what a run on a card stores in the host's memory to save memory on the card. PyTorch rounds
    #: pinned blocks up to powers of two, so the run may occupy up to twice as much.
    predicted_host_bytes: int = 0

    @property
    def techniques(self) -> tuple[str, ...]:
        """The names of the techniques that save memory without changing the result."""
        offloads = ("offload",) if self.offload_activations else ()
        on_host = (self.optimizer,) if self.optimizer == ADAMW_HOST else ()
        return (self.recompute, *offloads, *on_host)


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """The model of a plan."""

    #: the source of the model, as configured
    name: str
    num_parameters: int
    num_trainable_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """The device of a plan."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    #: all memory, for a card that is not in this machine
    free_bytes: int
    #: what the process holds outside PyTorch
    context_bytes: int


@dataclass(frozen=True, kw_only=True)
class OtherEstimate:
    """The estimate of another program for one quantity, and our prediction of the same."""

    #: the name of the other program
    name: str
    quantity: str
    #: the other program's estimate
    num_bytes: int
    #: our prediction
    predicted_bytes: int


@dataclass(frozen=True, kw_only=True)
class FirstAnswer:
    """The answer whether one setting fits, reported before the rest is planned."""

    #: whether the setting is the configuration's own
    is_configured: bool
    sizes: "Sizes"
    recompute: str
    device_bytes: int
    limit_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan(HtmlDisplay):
    """The settings that were considered, what each needs, and the one that was chosen."""

    model: PlannedModel
    device: PlannedDevice
    budget_bytes: int
    #: lengths and numbers of the samples, see `planned_data` in `planning/candidates.py`
    data: Mapping[str, Any]
    training: PlannedTraining
    #: by predicted time, the fastest first
    candidates: tuple[Candidate, ...]
    #: the index of the chosen candidate; None if none fits
    chosen: int | None
    #: the index of the configuration's own setting; None if that leaves the micro-batch open
    configured: int | None = None
    #: for the chosen candidate, or for the one that needs the least memory if none is chosen
    others: tuple[OtherEstimate, ...] = ()
    #: what the predictions assume, one message each
    assumptions: tuple[str, ...] = ()

    @property
    def limit_bytes(self) -> int:
        """The budget, or what the device has free where that is less."""
        return min(self.budget_bytes, self.device.free_bytes)

    def __repr__(self) -> str:
        """Return a summary in one line."""
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


def plan_json(plan: Plan) -> dict[str, object]:
    return asdict(plan)


def closest(plan: Plan) -> Candidate:
    """Return the candidate that needs the least memory and does not change the result."""
    same = (candidate for candidate in plan.candidates if candidate.result == "same")
    return min(same, key=lambda candidate: candidate.predicted_device_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How the samples of an optimizer step are split into micro-batches on one device."""

    micro_batch: int
    accumulation: int
    #: the samples of the last micro-batch if it is smaller than the others, else 0
    rest: int = 0
    #: the most tokens of a micro-batch if samples differ in length; None if samples are counted
    tokens: int | None = None

    @property
    def product(self) -> str:
        """The split as a product or sum.

        For example '6 x 4', '6 + 6 + 4' for 16 samples, '6 x 20 + 4' for many, '8,192 tokens x 3'.
        """
        if self.tokens is not None:
            return say(
                "{tokens} tokens x {accumulation}",
                tokens=f"{self.tokens:,}",
                accumulation=self.accumulation,
            )
        if not self.rest:
            return f"{self.micro_batch} x {self.accumulation}"
        whole = self.accumulation - 1
        if whole < _MOST_SUMMANDS:
            return " + ".join(map(str, (*[self.micro_batch] * whole, self.rest)))
        return f"{self.micro_batch} x {whole} + {self.rest}"

    @property
    def sentence(self) -> str:
        """The split as text.

        For example 'micro-batch 6, accumulation 4' or 'micro-batches of 6 + 6 + 4 samples'.
        """
        if self.tokens is not None:
            return say(
                "micro-batch of {tokens} tokens, accumulation {accumulation}",
                tokens=f"{self.tokens:,}",
                accumulation=self.accumulation,
            )
        if self.rest:
            return say("micro-batches of {sizes} samples", sizes=self.product)
        return say(
            "micro-batch {size}, accumulation {accumulation}",
            size=self.micro_batch,
            accumulation=self.accumulation,
        )


#: a sum of more micro-batches is abbreviated
_MOST_SUMMANDS = 5


def sizes_of(
    micro_batch: int,
    micro_tokens: int | None,
    accumulation: int,
    *,
    num_samples: int,
    is_uniform: bool,
) -> Sizes:
    """Return how the samples of an optimizer step are split.

    num_samples: the samples of an optimizer step on one device.
    is_uniform: whether all samples are equally long, so that tokens can be shown as samples.
    """
    if micro_tokens is not None and not is_uniform:
        return Sizes(micro_batch=micro_batch, accumulation=accumulation, tokens=micro_tokens)
    rest = num_samples % micro_batch if micro_batch < num_samples else 0
    return Sizes(micro_batch=micro_batch, accumulation=-(-num_samples // micro_batch), rest=rest)


def split_of(plan: Plan, candidate: Candidate) -> Sizes:
    """Return how the candidate splits the samples of an optimizer step on one device."""
    return sizes_of(
        candidate.micro_batch,
        candidate.micro_tokens,
        candidate.accumulation,
        num_samples=-(-plan.data["effective_batch"] // plan.data["gpus"]),
        is_uniform=plan.data["mean_row_tokens"] == plan.data["row_tokens"],
    )


def does_not_fit(plan: Plan) -> str:
    """Return the message for a plan in which nothing fits.

    It names the limit, the candidate that needs the least memory, that candidate's largest parts,
    and changes that would help.
    """
    nearest = closest(plan)
    parts = sorted(nearest.categories.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[:4] if size)
    return (
        f"no plan fits {format_bytes(plan.limit_bytes)} on {plan.device.name}: the closest candidate "
        f"({split_of(plan, nearest).sentence}, gradient checkpointing {', '.join(nearest.techniques)}) needs "
        f"{format_bytes(nearest.predicted_device_bytes)} ({named}). Try {' or '.join(_ways_out(plan, nearest))}"
    )


def _ways_out(plan: Plan, nearest: Candidate) -> Iterator[str]:
    """Yield changes with which something would fit."""
    same = (candidate for candidate in plan.candidates if candidate.result == "same")
    configured = next((each.optimizer for each in same if each.optimizer != ADAMW_HOST), ADAMW_HOST)
    for candidate in plan.candidates:
        if candidate.result != "same" and candidate.fits:
            is_same_method = candidate.method == nearest.method
            present_precision = nearest.precision if is_same_method else None
            changed = (
                ("optim.name", candidate.optimizer, configured),
                ("model.method", candidate.method, nearest.method),
                ("model.precision", candidate.precision, present_precision),
            )
            names = [
                f"{key}={value}" for key, value, present in changed if present and value != present
            ]
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
    else:
        # the budget is a fraction of the memory of the larger card too
        share = min(1.0, max(AUTO_SHARE, plan.budget_bytes / plan.device.free_bytes))
        yield f"a card with {format_bytes(math.ceil(nearest.predicted_device_bytes / share))}"
