"""`fitune plan`: what each setting would need, and the largest micro-batch that fits."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from fitune.cli.arguments import ConfigArguments, ConfigFlags, read_arguments
from fitune.cli.output import Format, console, print_json, table
from fitune.errors import DoesNotFitError
from fitune.units import format_bytes, format_count, format_gib

if TYPE_CHECKING:
    from fitune.plan.plan import Candidate, Plan


def plan(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    gpu: Annotated[str | None, Parameter(help="a card to plan for, like 'RTX 4090', or cpu (memory.gpu)")] = None,
    budget: Annotated[str | None, Parameter(help="memory to stay within: 20GiB, or 0.9 of it (memory.budget)")] = None,
    output_format: Format = "auto",
) -> None:
    """Predicted memory of each setting, and the largest micro-batch that fits; recomputation only where nothing fits
    without it. Needs no card, no weights and no data: a preset or a config.json is enough. Exit 3: nothing fits."""
    given = [f"memory.{key}={value}" for key, value in (("gpu", gpu), ("budget", budget)) if value is not None]
    config = read_arguments(words, flags, overrides=given).config
    from fitune.plan.plan import plan_json
    from fitune.plan.planner import choose_plan

    found = choose_plan(config)
    if output_format == "json":
        print_json(plan_json(found))
    elif output_format == "quiet":
        print("none" if found.chosen is None else found.candidates[found.chosen].micro_batch)
    else:
        _print(found, console(output_format))
    if found.chosen is None:
        raise DoesNotFitError(does_not_fit(found))


def does_not_fit(plan: "Plan") -> str:
    """One sentence: the closest candidate, its largest parts, and what would make room."""
    closest = min(plan.candidates, key=lambda candidate: candidate.predicted_device_bytes)
    parts = sorted(closest.categories.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[:4] if size)
    return (
        f"no plan fits {format_bytes(plan.budget_bytes)} on {plan.device.name}: the closest candidate "
        f"({closest.micro_batch} rows at once, recompute {closest.recompute}) needs "
        f"{format_bytes(closest.predicted_device_bytes)} ({named}). Try {' or '.join(_ways_out(plan, closest))}"
    )


def _ways_out(plan: "Plan", closest: "Candidate") -> Iterator[str]:
    largest = max(closest.categories, key=lambda name: closest.categories[name])
    if largest in ("activation", "temporary", "input"):
        if closest.recompute != "full":
            yield "model.recompute=full"
        if closest.micro_batch > 1:
            yield "a smaller batch.micro"
        yield f"data.max_length={plan.data['max_length'] // 2}"
    else:
        if closest.method == "full":
            yield "model.method=lora"
        yield "a smaller model"
    yield "a larger memory.budget"


def _print(plan: "Plan", screen: Console) -> None:
    for title, line in _heading(plan):
        screen.print(f"{title:<9}{line}", soft_wrap=True)
    shown = plan.candidates[plan.chosen if plan.chosen is not None else 0]
    screen.print()
    screen.print(f"at the peak (longest rows, in {shown.peak_phase})", soft_wrap=True)
    parts = [(name, size) for name, size in shown.categories.items() if size]
    total = shown.predicted_allocated_bytes
    rows: list[tuple[str, str, str]] = [(name, format_gib(size), f"{size / total:.0%}") for name, size in parts]
    rows += [
        ("= allocated", format_gib(total), "100%"),
        ("= reserved", format_gib(shown.predicted_reserved_bytes), ""),
        ("+ context", format_gib(plan.device.context_bytes), ""),
        ("= device (nvidia-smi)", format_gib(shown.predicted_device_bytes), ""),
    ]
    screen.print(table(("part", ">GiB", ">share"), rows))
    screen.print()
    screen.print("rows x accumulation; GiB")
    columns = ("  batch", "recompute", "optimizer", ">alloc.", ">reserved", ">device", "fits")
    screen.print(table(columns, [_row(plan, index) for index in range(len(plan.candidates))]))


def _heading(plan: "Plan") -> Iterator[tuple[str, str]]:
    first = plan.candidates[0]
    trainable = (
        ""
        if plan.model.num_trainable_parameters == plan.model.num_parameters
        else f" · {format_count(plan.model.num_trainable_parameters)} trained"
    )
    yield "model", f"{plan.model.name} · {format_count(plan.model.num_parameters)}{trainable} · {first.method}"
    length = f"{plan.data['row_tokens']:,} tokens ({plan.data['row_tokens_origin']})"
    yield "target", f"effective batch {plan.data['effective_batch']} · rows of {length} · {first.precision}"
    device = plan.device
    yield (
        "budget",
        f"{device.name} · {format_bytes(device.total_bytes)} visible · {format_bytes(device.free_bytes)} free · "
        f"budget {format_bytes(plan.budget_bytes)}",
    )


def _row(plan: "Plan", index: int) -> tuple[str, ...]:
    candidate = plan.candidates[index]
    left = min(plan.budget_bytes, plan.device.total_bytes) - candidate.predicted_device_bytes
    fits = f"yes, {format_bytes(left)} left" if candidate.fits else f"no, {candidate.reason}"
    return (
        f"{'*' if index == plan.chosen else ' '} {candidate.micro_batch} x {candidate.accumulation}",
        candidate.recompute,
        candidate.optimizer,
        format_gib(candidate.predicted_allocated_bytes),
        format_gib(candidate.predicted_reserved_bytes),
        format_gib(candidate.predicted_device_bytes),
        fits,
    )
