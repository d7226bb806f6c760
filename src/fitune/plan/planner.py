"""Which setting to run: the largest micro-batch that fits, with recomputation only where nothing fits without it.

The rows of an optimizer step stay as configured; only how they are cut, and what is kept for the backward, is chosen.
What the configuration forces is not varied. This does not yet weigh speed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fitune.config import RunConfig
from fitune.data.examples import load_examples
from fitune.errors import UsageError
from fitune.memory.devices import Device, context_prior, find_device, this_machine
from fitune.model.load import load_tokenizer, source_kind
from fitune.plan.plan import Candidate, Plan, PlannedDevice, PlannedModel
from fitune.plan.predict import RunPrediction, choose_target, heaviest_passes, predict_run, rows_per_micro_batch
from fitune.units import format_bytes, parse_bytes

AUTO_SHARE = 0.9
"""Of the free memory, where no budget is given: other processes and the context's uncertainty need room."""
MOST_MICRO_TOKENS = 65536
"""No card gets faster above; a larger micro-batch is never proposed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """rows: of a micro-batch, None where the configuration leaves it to the token budget that training takes."""

    rows: int | None
    recompute: str


@dataclass(frozen=True, slots=True)
class Limits:
    device: Device
    budget_bytes: int
    row_tokens: int
    rows_origin: str

    @property
    def limit_bytes(self) -> int:
        return min(self.budget_bytes, self.device.total_bytes)


def choose_plan(
    config: RunConfig, *, gpu: str | None = None, on_candidate: Callable[[str], None] | None = None
) -> Plan:
    """Candidates and the chosen one; none where nothing fits. gpu: as `predict`. on_candidate: told what is looked at.

    Without a card, here or by name, memory.budget as a size stands for any card with so much memory.
    """
    limits = find_limits(config, gpu=gpu)
    looked_at: dict[Choice, tuple[Candidate, RunPrediction]] = {}

    def fits(choice: Choice) -> bool:
        if choice not in looked_at:
            if on_candidate is not None:
                on_candidate(_words(choice))
            looked_at[choice] = look_at(config, choice, limits)
        return looked_at[choice][0].fits

    chosen = _search(config, limits, fits)
    order = sorted(looked_at, key=lambda choice: (choice.recompute != "off", -(choice.rows or 0)))
    prediction = looked_at[chosen or order[0]][1]
    return Plan(
        model=PlannedModel(
            name=config.model.source,
            num_parameters=prediction.recorded.num_parameters,
            num_trainable_parameters=prediction.recorded.num_trainable_parameters,
        ),
        device=PlannedDevice(
            name=limits.device.name,
            total_bytes=limits.device.total_bytes,
            free_bytes=_free_bytes(limits.device),
            context_bytes=prediction.context_bytes,
        ),
        budget_bytes=limits.budget_bytes,
        data={
            "max_length": config.data.max_length,
            "row_tokens": limits.row_tokens,
            "row_tokens_origin": limits.rows_origin,
            "effective_batch": config.batch.rows_per_step,
        },
        candidates=tuple(looked_at[choice][0] for choice in order),
        chosen=None if chosen is None else order.index(chosen),
        assumptions=_assumptions(prediction),
    )


def find_limits(config: RunConfig, *, gpu: str | None = None) -> Limits:
    named = gpu or config.memory.gpu
    budget = config.memory.budget
    size = parse_bytes(budget) if isinstance(budget, str) and budget != "auto" else None
    if named is None and size is not None and not this_machine():
        device = _any_card(size)
    else:
        device = choose_target(config, gpu=gpu)
    row_tokens, origin = longest_row(config)
    return Limits(device, budget_bytes(config, device), row_tokens, origin)


def budget_bytes(config: RunConfig, device: Device) -> int:
    """Of memory.budget on that device; auto is a share of what is free now."""
    budget = config.memory.budget
    if isinstance(budget, str) and budget != "auto":
        return parse_bytes(budget)
    return int((AUTO_SHARE if isinstance(budget, str) else budget) * _free_bytes(device))


def longest_row(config: RunConfig) -> tuple[int, str]:
    """(tokens, where that is known from): of the data where it is here and can be read, else data.max_length."""
    sources = config.data.train_sources
    if all(Path(source.path.partition("#")[0]).exists() for source in sources):
        tokenizer_source = config.model.tokenizer or config.model.source
        try:
            if source_kind(tokenizer_source) != "hub":
                examples = load_examples(
                    config.data, load_tokenizer(config.model), split="train", eval_max_rows=config.eval.max_rows
                )
                if len(examples):
                    return int(examples.lengths.max()), "the longest row of the data"
        except UsageError:
            pass  # the data is no condition of a plan; `fitune check` and `fitune train` say what is wrong with it
    return config.data.max_length, "data.max_length"


def look_at(config: RunConfig, choice: Choice, limits: Limits) -> tuple[Candidate, RunPrediction]:
    settled = settle(config, choice, row_tokens=limits.row_tokens)
    prediction = predict_run(
        settled,
        limits.device,
        passes=heaviest_passes(settled, limits.device, row_tokens=limits.row_tokens),
        limit_bytes=limits.limit_bytes,
    )
    recorded, largest = prediction.recorded, prediction.largest
    micro = rows_per_micro_batch(settled, limits.device, limits.row_tokens)
    candidate = Candidate(
        micro_batch=micro,
        micro_tokens=recorded.layout.micro_tokens,
        accumulation=-(-settled.batch.rows_per_step // micro),
        recompute=choice.recompute,
        loss="chunked" if recorded.chunked else "full",
        optimizer=settled.optim.name,
        precision=recorded.precision.name,
        method=settled.model.method,
        attention=settled.model.attention,
        packing=recorded.layout.packed,
        predicted_allocated_bytes=largest.peak_allocated_bytes,
        predicted_reserved_bytes=largest.peak_reserved_bytes,
        predicted_device_bytes=largest.peak_reserved_bytes + prediction.context_bytes,
        categories=largest.categories,
        peak_phase=prediction.peak_phase,
        fits=bool(largest.fits),
        reason=_reason(prediction, limits),
    )
    return candidate, prediction


def settle(config: RunConfig, choice: Choice, *, row_tokens: int) -> RunConfig:
    """The configuration with the choice written into it."""
    model = config.model.model_copy(update={"recompute": choice.recompute})
    batch = config.batch
    if choice.rows is not None and batch.micro_rows is None:
        cut = (
            {"micro_tokens": choice.rows * row_tokens, "effective": batch.rows_per_step}
            if config.data.packing
            else {"micro": choice.rows, "effective": batch.rows_per_step}
        )
        batch = batch.model_copy(update=cut)
    return config.model_copy(update={"model": model, "batch": batch})


def _search(config: RunConfig, limits: Limits, fits: Callable[[Choice], bool]) -> Choice | None:
    """More rows never need less memory, so the largest that fits is found by halving the list."""
    for recompute in _recomputes(config):
        rows = list(_rows(config, limits))
        low, high = 0, len(rows)  # the first `low` fit, those from `high` on do not
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(Choice(rows[middle], recompute)) else (low, middle)
        if low:
            return Choice(rows[low - 1], recompute)
    return None


def _recomputes(config: RunConfig) -> tuple[str, ...]:
    return ("off", "full") if config.model.recompute == "auto" else (config.model.recompute,)


def _rows(config: RunConfig, limits: Limits) -> Iterator[int | None]:
    batch = config.batch
    if batch.micro_rows is not None or batch.micro_tokens != "auto":
        yield rows_per_micro_batch(config, limits.device, limits.row_tokens)
        return
    for rows in range(1, batch.rows_per_step + 1):
        if batch.rows_per_step % rows == 0 and (rows == 1 or rows * limits.row_tokens <= MOST_MICRO_TOKENS):
            yield rows


def _words(choice: Choice) -> str:
    return f"{choice.rows} rows at once, recompute {choice.recompute}"


def _reason(prediction: RunPrediction, limits: Limits) -> str:
    largest = prediction.largest
    if not largest.fits:
        over = largest.peak_reserved_bytes + prediction.context_bytes - limits.limit_bytes
        return f"needs {format_bytes(max(over, 1))} more"
    if largest.num_alloc_retries:
        return f"fits by giving cached blocks back {largest.num_alloc_retries} times"
    return ""


def _assumptions(prediction: RunPrediction) -> tuple[str, ...]:
    interval = prediction.largest.device_interval
    return (*(interval.reasons if interval else ()), *prediction.largest.assumptions, *prediction.recorded.notes)


def _free_bytes(device: Device) -> int:
    return device.total_bytes if device.free_bytes is None else device.free_bytes


def _any_card(num_bytes: int) -> Device:
    card = find_device("A100 40GB")
    return replace(
        card,
        name=f"any card of {format_bytes(num_bytes)}",
        box_bytes=num_bytes,
        total_bytes=num_bytes,
        context=context_prior((8, 0)),
    )
