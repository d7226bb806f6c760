"""Implement `fitune check`, which reports on the data before training."""

import io
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from fitune.cli.arguments import ConfigArguments, ConfigFlags, read_arguments
from fitune.cli.output import Format, Screen, console
from fitune.config import DataConfig, SampleKind
from fitune.data.report import DataReport, SplitReport, grouped
from fitune.data.tokenizer_limits import in_time
from fitune.language import say, translated
from fitune.language.printable import json_text
from fitune.training.session import check_inputs
from fitune.units import format_count

if TYPE_CHECKING:
    from fitune.data.examples import Examples

_MASKED = {
    "assistant": "assistant turns only",
    "last": "the last assistant turn only",
    "all": "every token",
}


def check(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    show: Annotated[
        int,
        Parameter(
            validator=Number(gte=0), help="also show so many samples as the model will see them"
        ),
    ] = 0,
    output_format: Format = "auto",
) -> None:
    """Report on the data: format, template, supervised share, lengths, samples cut or dropped.

    The first word is a configuration, or a data file that is tokenised with the tokenizer and the
    chat template of --model.
    """
    if words and "=" not in words[0] and not words[0].endswith((".yaml", ".yml")):
        flags, words = replace(flags, data=(words[0], *flags.data)), words[1:]
    config = read_arguments(words, flags).config
    check_inputs(config.model, config.data)
    from fitune.model.load import load_tokenizer

    screen = console(output_format)
    text = report_on(
        config.data,
        tokenizer=load_tokenizer(config.model),
        output_format="json" if output_format == "json" else "human",
        eval_max_rows=config.eval.max_rows,
        kind=config.sample_kind,
        show=show,
        width=screen.width,
        colour=screen.is_terminal and not screen.no_color,
    )
    if output_format != "quiet":
        screen.file.write(text if text.endswith("\n") else f"{text}\n")


def report_on(
    data: DataConfig,
    *,
    tokenizer: object,
    output_format: Literal["human", "json"] = "human",
    eval_max_rows: int = 2000,
    kind: SampleKind = "answer",
    show: int = 0,
    width: int = 100,
    colour: bool = False,
) -> str:
    """Return the report on `data` as a table of at most `width` columns, or as a JSON object.

    show: number of samples to print as the model sees them. Supervised tokens are green, or
        between ⟦ and ⟧ without colour.

    Raises DataError if the data cannot be trained on.
    """
    from fitune.data.examples import load_examples

    with tqdm(
        unit=f" {say('samples')}", desc=say("tokenise"), file=sys.stderr, delay=1, disable=None
    ) as bar:
        examples = load_examples(
            data,
            tokenizer,
            eval_max_rows=eval_max_rows,
            kind=kind,
            on_progress=lambda num_rows: bar.update(num_rows - bar.n),
        )
    report = examples.report
    if output_format == "json":
        content = {"schema": 1, **asdict(report), "supervised_fraction": report.supervised_fraction}
        return json_text({**content, "data_hash": examples.data_hash}, indent=2)
    screen = Screen(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
    )
    for source in report.sources:
        formats = ", ".join(source.formats) or "n/a"
        screen.print(translated(f"data     {source.path}: {formats}, {source.num_rows:,} samples"))
    for message in _format_lines(data, report):
        screen.print(translated(message))
    for message in _loss_lines(examples, tokenizer, width=width):
        screen.print(translated(message))
    screen.print(_split_table(report))
    for message in _warnings(report):
        screen.print(f"! {translated(message)}")
    for title, rows, count in (
        ("bad samples, not used", report.bad_rows, report.num_bad_rows),
        (
            "samples dropped",
            report.dropped_rows,
            report.train.num_untrainable_rows + report.eval.num_untrainable_rows,
        ),
    ):
        if rows:
            screen.print(translated(f"{title}: {count:,}; the first ones"))
            for message in grouped(rows):
                screen.print(translated(f"  {message}"))
    for index in range(min(show, len(examples))):
        screen.print(_sample_text(examples, index, tokenizer, colour=colour))
    return screen.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _format_lines(data: DataConfig, report: DataReport) -> Iterator[str]:
    """Yield lines about what a sample is made of, and which of its tokens are learned."""
    share = f"{report.supervised_fraction:.1%} of tokens carry loss"
    if report.is_text:
        if data.wrapped:
            yield f"format   plain texts, joined and cut to {report.max_length} tokens"
        else:
            yield "format   plain texts without a template"
        yield f"loss     {_MASKED['all']} · {share}"
        return
    date = "" if report.date is None else f", which writes the date {report.date}"
    yield f"format   as messages through {report.template}{date}"
    found = "" if data.mask == "all" else f" (found by {report.mask})"
    yield f"loss     {_MASKED[data.mask]} · {share}{found}"


def _split_table(report: DataReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(say("split"))
    for heading in (
        "samples",
        "tokens",
        "p50",
        "p95",
        "p99",
        "max",
        f"> {report.max_length}",
        "no target",
    ):
        table.add_column(say(heading), justify="right", no_wrap=True)
    for name, split in (("train", report.train), ("eval", report.eval)):
        table.add_row(say(name), *_cells(split))
    return table


def _cells(split: SplitReport) -> tuple[str, ...]:
    lengths = split.quantiles
    if lengths is None:
        return (f"{split.num_rows:,}", "0", *["n/a"] * 4, "0", "0")
    num_read = split.num_rows + split.num_untrainable_rows
    quantiles = (lengths.p50_tokens, lengths.p95_tokens, lengths.p99_tokens, lengths.max_tokens)
    return (
        f"{split.num_rows:,}",
        format_count(split.num_tokens),
        *(f"{quantile:,}" for quantile in quantiles),
        f"{split.num_long_rows / num_read:.1%}",
        f"{split.num_untrainable_rows:,}",
    )


def _warnings(report: DataReport) -> Iterator[str]:
    yield from report.warnings
    if report.train.num_duplicate_rows:
        yield f"{report.train.num_duplicate_rows:,} training samples are copies of others"
    if (padding := report.train.padding) is not None:
        yield (
            f"padding every sample to {report.max_length} computes {padding.fixed:.2f} x the "
            "real tokens; groups of 8 "
            f"samples {padding.shuffled:.2f} x, sorted by length {padding.sorted:.2f} x, packing "
            f"{padding.packed:.2f} x"
        )


def _loss_lines(examples: "Examples", tokenizer: object, *, width: int) -> Iterator[str]:
    """Yield lines about supervised tokens of the first sample, ends of answers and cut samples."""
    report = examples.report
    row = next(iter(examples), None)
    if row is not None:
        places = row.loss_weights.nonzero()[0]
        breaks = [
            number for number in range(1, len(places)) if places[number] != places[number - 1] + 1
        ]
        said = repr(_text(tokenizer, row.input_ids[places[: breaks[0] if breaks else None]]))[1:-1]
        room = width - len("learned  ⟦⟧ in the first sample")
        said = said if len(said) <= room else f"{said[: room // 2 - 3]} ... {said[3 - room // 2 :]}"
        yield f"learned  ⟦{said}⟧ in the first sample"
    if report.is_text:
        before, after = (
            " or ".join(tokens) or "no token" for tokens in (report.begins, report.ends)
        )
        yield f"ends     before each text {before}, after it {after}"
    elif report.ends:
        yield f"ends     answers end with {', '.join(report.ends)}, where the saved model stops"
    num_long, num_lost = (
        sum(getattr(split, name) for split in (report.train, report.eval))
        for name in ("num_long_rows", "num_untrainable_rows")
    )
    if num_long or num_lost:
        cut = f"{num_long:,} samples have over {report.max_length} tokens; {num_lost:,} samples teach nothing and go"
        yield f"cut      {cut}"


def _text(tokenizer: Any, ids: Any) -> str:
    return in_time(lambda: str(tokenizer.decode(ids)), num_chars=len(ids))


def _sample_text(examples: "Examples", index: int, tokenizer: object, *, colour: bool) -> Text:
    row = examples[index]
    text = Text().append(
        say("sample {number}: {tokens} tokens", number=row.row_id, tokens=f"{len(row):,}") + "\n",
        style="bold",
    )
    for supervised, run in groupby(
        range(len(row)), key=lambda place: bool(row.loss_weights[place])
    ):
        part = _text(tokenizer, row.input_ids[list(run)])
        text.append(
            part if colour or not supervised else f"⟦{part}⟧",
            style="green" if supervised else "dim",
        )
    return text
