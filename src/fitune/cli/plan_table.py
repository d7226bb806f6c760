"""A plan as a person reads it: what there is, what is alive at the peak, the candidates, what others would say."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fitune.cli.output import Screen, html_block, table
from fitune.cli.plan_training import training_lines, training_warnings
from fitune.language import pad, say
from fitune.plan.plan import SHOWN, Candidate, Plan, closest, counts_rows
from fitune.units import format_bytes, format_count, format_gib, format_seconds

if TYPE_CHECKING:
    from fitune.plan.measure import PlanMeasured

_NUM_FITTING, _NUM_REFUSED = 5, 4
_MEANINGS = {
    "cuda": (
        "torch.cuda.max_memory_allocated",
        "torch.cuda.max_memory_reserved",
        "outside PyTorch",
        "nvidia-smi will show",
    ),
    "cpu": (
        "tensors alive at once",
        "with freed memory that the C library keeps",
        "the program itself",
        "the process in all",
    ),
}
"""Of the four sums below the parts, on each kind of device."""


def show_plan(plan: Plan, screen: Screen, *, every: bool = False) -> None:
    """every: all candidates, else those that tell the most."""
    if (verdict := _verdict(plan)) is not None:
        screen.print(verdict, soft_wrap=True)
        screen.print()
    for title, line in (*_heading(plan), *training_lines(plan.training)):
        screen.print(f"{pad(title, 9)}{line}", soft_wrap=True)
    shown = closest(plan) if plan.chosen is None else plan.candidates[plan.chosen]
    screen.print()
    headings = (say("at the peak ({phase})", phase=say(shown.peak_phase)), say("how"), ">GiB", f">{say('share')}")
    screen.print(table(headings, list(_parts(plan, shown))))
    screen.print()
    numbers = range(len(plan.candidates)) if every else telling(plan)
    columns = (
        f"   {say('micro x accum, recompute')}",
        ">GiB",
        say("fits"),
        f">{say('tok/s')}",
        f">{say('epoch')}",
        say("result"),
    )
    screen.print(table(columns, [_row(plan, number) for number in numbers]))
    if not every:
        screen.print(say("--all predicts every setting, also those that change the result (LoRA, QLoRA, 8-bit)"))
    for line in (*_footnotes(plan, len(list(numbers))), *training_warnings(plan.training)):
        screen.print(line, soft_wrap=True)


def _verdict(plan: Plan) -> str | None:
    """The answer in one sentence; None where nothing fits, which is said as an error."""
    if plan.chosen is None:
        return None
    chosen = plan.candidates[plan.chosen]
    rate = tokens_per_second(plan, chosen)
    seconds = plan.data["epoch_tokens"] / rate if rate and plan.data["epoch_tokens"] else None
    words = {
        "split": split_words(plan, chosen),
        "needed": format_gib(chosen.predicted_device_bytes, 1),
        "limit": format_gib(plan.limit_bytes, 1),
    }
    if seconds is None:
        return say("micro-batch x gradient accumulation {split}: {needed} of {limit} GiB", **words)
    return say(
        "micro-batch x gradient accumulation {split}: {needed} of {limit} GiB, {time} an epoch",
        **words,
        time=format_seconds(seconds),
    )


def html_plan(plan: Plan) -> str:
    """For a notebook."""
    return html_block(lambda screen: show_plan(plan, screen))


def show_measured(plan: Plan, measured: "PlanMeasured", screen: Screen) -> None:
    screen.print()
    screen.print(say("{steps} real steps of the chosen one, predicted beside measured:", steps=measured.num_steps))
    seconds = measured.predicted_seconds_per_step
    rows = [
        (
            say("seconds per step"),
            "n/a" if seconds is None else f"{seconds:.3g}",
            f"{measured.measured_seconds_per_step:.3g}",
        )
    ]
    for name, predicted, found in (
        (say("allocated"), measured.predicted_allocated_bytes, measured.measured_allocated_bytes),
        (say("reserved"), measured.predicted_reserved_bytes, measured.measured_reserved_bytes),
    ):
        if found is not None:
            rows.append((name, format_bytes(predicted), format_bytes(found)))
    screen.print(table(("", f">{say('predicted')}", f">{say('measured')}"), rows))


def telling(plan: Plan) -> list[int]:
    """The chosen one, the fastest others that fit, the fastest that do not, the best of each recompute, proposals;
    where nothing fits, the closest."""
    indices = range(len(plan.candidates))
    same = [i for i in indices if plan.candidates[i].result == "same"]
    fitting = [i for i in same if plan.candidates[i].fits]
    refused = [i for i in same if not plan.candidates[i].fits]
    best = {(plan.candidates[i].recompute, plan.candidates[i].offload_activations): i for i in reversed(fitting)}
    proposed = [i for i in indices if plan.candidates[i].result != "same"]
    nearest = [plan.candidates.index(closest(plan))] if plan.chosen is None else []
    return sorted({*fitting[:_NUM_FITTING], *refused[:_NUM_REFUSED], *best.values(), *proposed, *nearest})


def tokens_per_second(plan: Plan, candidate: Candidate) -> float | None:
    seconds = candidate.predicted_seconds_per_step
    return None if seconds is None else float(plan.data["tokens_per_step"]) / seconds


def split_words(plan: Plan, candidate: Candidate) -> str:
    """'4 x 6' where all rows are equally long, else '8,192 tokens x 3'."""
    if counts_rows(plan, candidate):
        return f"{candidate.micro_batch} x {candidate.accumulation}"
    return say(
        "{tokens} tokens x {accumulation}", tokens=f"{candidate.micro_tokens:,}", accumulation=candidate.accumulation
    )


def _heading(plan: Plan) -> Iterator[tuple[str, str]]:
    first, model, device, data = plan.candidates[0], plan.model, plan.device, plan.data
    whole = model.num_trainable_parameters == model.num_parameters
    trained = "" if whole else f" · {say('{count} trained', count=format_count(model.num_trainable_parameters))}"
    shape = f"{model.num_layers} x {model.hidden_size:,} · {say('vocabulary {number}', number=f'{model.vocab_size:,}')}"
    yield say("model"), f"{model.name} · {format_count(model.num_parameters)}{trained} · {shape} · {first.method}"
    yield (
        say("target"),
        say(
            "effective batch {rows} · rows up to {tokens} tokens ({origin}), {mean} on average",
            rows=data["effective_batch"],
            tokens=f"{data['row_tokens']:,}",
            origin=say(data["row_tokens_origin"]),
            mean=f"{data['mean_row_tokens']:,.0f}",
        )
        + f" · {first.optimizer} · {first.precision}",
    )
    if data["gpus"] > 1:
        yield say("cards"), say("{number}, which share the rows of a step; memory is of each", number=data["gpus"])
    yield (
        say("budget"),
        say(
            "{device} · {total} visible · {free} free · budget {budget}",
            device=device.name,
            total=format_bytes(device.total_bytes),
            free=format_bytes(device.free_bytes),
            budget=format_bytes(plan.budget_bytes),
        )
        + ("" if plan.budget_bytes <= plan.device.free_bytes else say(", more than there is: what is free counts")),
    )


def _parts(plan: Plan, shown: Candidate) -> Iterator[tuple[str, str, str, str]]:
    total = shown.predicted_allocated_bytes
    model = plan.model
    counts = {
        "parameter": model.num_parameters,
        "gradient": model.num_trainable_parameters,
        "optimizer_state": model.num_trainable_parameters,
    }
    positions = shown.micro_tokens or shown.micro_batch * plan.data["row_tokens"]
    for name, size in shown.categories.items():
        how = ""
        if name in counts:
            how = f"{format_count(counts[name])} x {size / counts[name]:.1f} B"
        elif name == "activation":
            how = say("{tokens} tokens x {size}", tokens=f"{positions:,}", size=_small(size / positions))
        if size:
            yield say(name), how, format_gib(size), f"{size / total:.0%}"
    sums = (
        ("= allocated", format_gib(total), "100%"),
        ("= reserved", format_gib(shown.predicted_reserved_bytes), ""),
        ("+ context", format_gib(plan.device.context_bytes), ""),
        ("= device", format_gib(shown.predicted_device_bytes), ""),
    )
    for (title, gib, share), meaning in zip(sums, _MEANINGS[plan.device.kind], strict=True):
        yield say(title), say(meaning), gib, share


def _small(num_bytes: float) -> str:
    return f"{num_bytes / 1024:,.0f} KiB"


def _row(plan: Plan, index: int) -> Sequence[str]:
    candidate = plan.candidates[index]
    left = plan.limit_bytes - candidate.predicted_device_bytes
    rate = tokens_per_second(plan, candidate)
    epoch = plan.data["epoch_tokens"] / rate if rate and plan.data["epoch_tokens"] else None
    changes = [candidate.recompute, *(["offload"] if candidate.offload_activations else [])]
    reference = plan.candidates[0]
    both = len({each.loss for each in plan.candidates}) > 1
    changes += [say("full logits")] if candidate.loss == "full" and both else []
    changes += [
        getattr(candidate, name)
        for name in ("optimizer", "method", "precision")
        if getattr(candidate, name) != getattr(reference, name)
    ]
    return (
        f"{index:>2}{'*' if index == plan.chosen else ' '} {split_words(plan, candidate)}, {', '.join(changes)}",
        format_gib(candidate.predicted_device_bytes, 1),
        fits_words(candidate, left),
        format_count(rate),
        format_seconds(epoch),
        say(candidate.result),
    )


def fits_words(candidate: Candidate, left_bytes: int) -> str:
    if candidate.fits:
        return say("yes, {left} left", left=format_gib(left_bytes, 1))
    if candidate.fits is None:
        return say("perhaps, at most +{more}", more=format_gib(-left_bytes, 1))
    return say("no, +{more}", more=format_gib(-left_bytes, 1))


def _footnotes(plan: Plan, num_shown: int) -> Iterator[str]:
    if num_shown < len(plan.candidates):
        yield say("{shown} of {total} candidates; --all shows every one", shown=num_shown, total=len(plan.candidates))
    if plan.others:
        yield ""
        if plan.chosen is None:
            yield say("what others say of the closest one (ours in brackets):")
        else:
            yield say("what others say of the marked one (ours in brackets):")
    for other in plan.others:
        difference = other.num_bytes / other.predicted_bytes - 1 if other.predicted_bytes else 0.0
        yield (
            f"  {other.name}: {say(other.quantity)} {format_bytes(other.num_bytes)} "
            f"({format_bytes(other.predicted_bytes)}, {difference:+.0%})"
        )
    yield from plan.assumptions[: 1 if plan.data["gpus"] == 1 else 2]
    yield from (line for line in plan.assumptions if line.startswith(SHOWN))
