"""Print a plan: the setting, the live memory at the peak, the candidates and other estimates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table

from fitune.cli.output import Screen, html_block, table
from fitune.cli.plan_training import training_lines, training_warnings
from fitune.language import pad, say
from fitune.planning.plan import Candidate, FirstAnswer, Plan, closest, split_of
from fitune.planning.plan_text import (
    changes_of,
    fits_text,
    highlighted_settings,
    predicted_rate,
    shown_assumptions,
    verdict,
)
from fitune.units import format_bytes, format_count, format_gib, format_seconds

if TYPE_CHECKING:
    from fitune.planning.measure import PlanMeasured

#: Kind of device -> what the four sums of the memory table mean there.
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

_TITLE_WIDTH = 9
#: columns of a candidate's number and of its mark
_NUMBER_WIDTH = 4
#: columns between two columns of a table
_GAP = 3

MORE_IN_TERMINAL = "--all predicts every setting and shows it, also those that change the result (LoRA, QLoRA, 8-bit)"
MORE_IN_PYTHON = "these are {shown} of {total} candidates: Plan.candidates holds all"


def show_plan(
    plan: Plan, screen: Screen, *, every: bool = False, more: str = MORE_IN_TERMINAL
) -> None:
    """Print a plan.

    every: print all candidates, instead of those that answer the most frequent questions.
    more: the message that says where the other candidates can be found.
    """
    # A file or a pipe gets whole lines, which are easier to search.
    whole = not screen.is_terminal
    if (answer := verdict(plan)) is not None:
        screen.print(answer, soft_wrap=whole)
        screen.print()
    for title, line in (*_heading(plan), *training_lines(plan.training)):
        text = f"{pad(title, _TITLE_WIDTH)}{line}"
        if not whole:
            text = _folded(text, screen.width, separator=" · ", indent=_TITLE_WIDTH)
        screen.print(text, soft_wrap=True)
    shown = closest(plan) if plan.chosen is None else plan.candidates[plan.chosen]
    screen.print()
    headings = (
        say("at the peak ({phase})", phase=say(shown.peak_phase)),
        say("how"),
        ">GiB",
        f">{say('share')}",
    )
    screen.print(table(headings, list(_parts(plan, shown))))
    screen.print()
    labels = dict.fromkeys(range(len(plan.candidates)), "") if every else highlighted_settings(plan)
    screen.print(_candidates(plan, labels, every=every, width=screen.width))
    if not every:
        screen.print(say(more, shown=len(labels), total=len(plan.candidates)))
    for line in (*_footnotes(plan), *training_warnings(plan.training)):
        screen.print(line, soft_wrap=whole)


def _folded(text: str, width: int, *, separator: str, indent: int) -> str:
    """Break a text at its separators into lines of at most `width` columns, the later ones indented."""
    first, *others = text.split(separator)
    lines = [first]
    for number, part in enumerate(others, start=1):
        joined = f"{lines[-1]}{separator}{part}"
        end = "" if number == len(others) else separator.rstrip()
        if cell_len(joined + end) <= width:
            lines[-1] = joined
        else:
            lines[-1] += separator.rstrip()
            lines.append(" " * indent + part)
    return "\n".join(lines)


def first_answer_text(answer: FirstAnswer) -> str:
    """Return the message that is shown before the other candidates are planned."""
    return say(
        "your setting, {split}: {needed} of {limit} GiB, which fits"
        if answer.is_configured and answer.fits
        else "your setting, {split}: {needed} of {limit} GiB, which does not fit"
        if answer.is_configured
        else "so far: {split} needs {needed} of {limit} GiB and fits"
        if answer.fits
        else "so far: {split} needs {needed} of {limit} GiB and does not fit",
        split=answer.sizes.sentence,
        needed=format_gib(answer.device_bytes, 1),
        limit=format_gib(answer.limit_bytes, 1),
    )


def html_plan(plan: Plan) -> str:
    """Return the plan as an HTML block for a notebook."""
    return html_block(lambda screen: show_plan(plan, screen, more=MORE_IN_PYTHON))


def show_measured(plan: Plan, measured: "PlanMeasured", screen: Screen) -> None:
    screen.print()
    screen.print(
        say(
            "{steps} real steps of the chosen one, predicted beside measured:",
            steps=measured.num_steps,
        )
    )
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


def _heading(plan: Plan) -> Iterator[tuple[str, str]]:
    first, model, device, data = plan.candidates[0], plan.model, plan.device, plan.data
    whole = model.num_trainable_parameters == model.num_parameters
    trained = (
        ""
        if whole
        else f" · {say('{count} trained', count=format_count(model.num_trainable_parameters))}"
    )
    shape = f"{model.num_layers} x {model.hidden_size:,} · {say('vocabulary {number}', number=f'{model.vocab_size:,}')}"
    yield (
        say("model"),
        f"{model.name} · {format_count(model.num_parameters)}{trained} · {shape} · {first.method}",
    )
    yield (
        say("target"),
        say(
            "effective batch {rows} · samples of up to {tokens} tokens ({origin}), {mean} on average",
            rows=data["effective_batch"],
            tokens=f"{data['row_tokens']:,}",
            origin=say(data["row_tokens_origin"]),
            mean=f"{data['mean_row_tokens']:,.0f}",
        )
        + f" · {first.optimizer} · {first.precision}",
    )
    if data["gpus"] > 1:
        yield (
            say("cards"),
            say(
                "{number}, which share the samples of a step; memory is of each",
                number=data["gpus"],
            ),
        )
    yield (
        say("memory"),
        say(
            "{device} · {total} visible · {free} free · memory limit {budget}",
            device=device.name,
            total=format_bytes(device.total_bytes),
            free=format_bytes(device.free_bytes),
            budget=format_bytes(plan.budget_bytes),
        )
        + (
            ""
            if plan.budget_bytes <= plan.device.free_bytes
            else say(", more than there is: what is free counts")
        ),
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
            how = say(
                "{tokens} tokens x {size}", tokens=f"{positions:,}", size=_kib(size / positions)
            )
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


def _kib(num_bytes: float) -> str:
    return f"{num_bytes / 1024:,.0f} KiB"


def _candidates(plan: Plan, labels: Mapping[int, str], *, every: bool, width: int) -> Table:
    """Return the table of candidates, in which the settings fold where `width` is too small.

    Unless all candidates are shown, the columns that say nothing for any of them are left out.
    """
    rows = [_row(plan, number, label, labels) for number, label in labels.items()]
    headings = (
        f"   {say('micro-batch x accumulation, gradient checkpointing')}",
        ">GiB",
        say("fits"),
        f">{say('tok/s')}",
        f">{say('epoch')}",
        say("result"),
    )
    empty = {"n/a", say("same")}
    kept = [
        i for i in range(len(headings)) if every or i < 4 or not {row[i] for row in rows} <= empty
    ]
    lines = [[row[i] for i in kept] for row in (headings, *rows)]
    others = (
        max(cell_len(cell.removeprefix(">")) for cell in column)
        for column in [*zip(*lines, strict=True)][1:]
    )
    left = width - sum(column + _GAP for column in others)
    label_width = max(map(cell_len, labels.values()))
    indent = _NUMBER_WIDTH + (label_width + 2 if label_width else 0)
    for line in lines:
        line[0] = _folded(line[0], left, separator=", ", indent=3 if line is lines[0] else indent)
    return table(lines[0], lines[1:])


def _row(plan: Plan, index: int, label: str, labels: Mapping[int, str]) -> Sequence[str]:
    """Return the cells of a candidate. labels: the labels of all rows, which set the padding."""
    width = max(map(cell_len, labels.values()))
    name = f"{pad(label, width)}  " if width else ""
    candidate = plan.candidates[index]
    left = plan.limit_bytes - candidate.predicted_device_bytes
    rate = predicted_rate(plan, candidate)
    epoch = plan.data["epoch_tokens"] / rate if rate and plan.data["epoch_tokens"] else None
    return (
        f"{index:>2}{'*' if index == plan.chosen else ' '} "
        f"{name}{split_of(plan, candidate).product}, "
        f"{', '.join(changes_of(plan, candidate))}",
        format_gib(candidate.predicted_device_bytes, 1),
        fits_text(candidate, left),
        format_count(rate),
        format_seconds(epoch),
        say(candidate.result),
    )


def _footnotes(plan: Plan) -> Iterator[str]:
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
    yield from shown_assumptions(plan)
