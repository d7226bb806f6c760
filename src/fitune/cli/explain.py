"""Implement `fitune explain`, which reads the message of an out-of-memory error and says what it means."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fitune.cli.output import Format, console, print_json, print_text, table
from fitune.errors import UsageError
from fitune.language import say
from fitune.machine.oom_message import OomMessage, read_oom_message
from fitune.plain_files import MAX_LOG_BYTES, read_plain
from fitune.units import format_bytes, format_gib


def explain(
    file: Annotated[
        str | None, Parameter(help="a file with the message, such as a log; stdin by default")
    ] = None,
    output_format: Format = "auto",
) -> None:
    """Read "CUDA out of memory. Tried to allocate ..." and say what filled the card, and what helps.

    Raises UsageError for text without such a message.
    """
    if file is None and sys.stdin.isatty():
        raise UsageError("no message: paste it, as in fitune explain < message.txt")
    message = read_oom_message(sys.stdin.read() if file is None else _read(file))
    if output_format == "json":
        print_json(asdict(message) | {"advice": list(advice(message))})
        return
    if output_format == "quiet":
        print_text(message.asked_bytes)
        return
    screen = console(output_format)
    screen.print(table((say("the card"), ">GiB"), list(_rows(message))))
    for sentence in advice(message):
        screen.print(sentence, soft_wrap=True)


def _read(file: str) -> str:
    try:
        content = read_plain(Path(file), most_bytes=MAX_LOG_BYTES, follow=True)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    return content.decode("utf-8", errors="replace")


def _rows(message: OomMessage) -> Iterator[tuple[str, str]]:
    for name, size in (
        (say("in tensors"), message.allocated_bytes),
        (say("held by PyTorch, unused"), message.unused_bytes),
        (say("CUDA itself and other libraries"), message.outside_bytes),
        (say("other processes"), message.others_bytes or None),
        (say("free"), message.free_bytes),
        (say("in all"), message.total_bytes),
        (say("asked for"), message.asked_bytes),
    ):
        if size is not None:
            yield name, format_gib(size, 2)


def advice(message: OomMessage) -> Iterator[str]:
    """Yield what would make room, what costs least first."""
    asked = format_bytes(message.asked_bytes)
    if message.limit_bytes is not None:
        yield say(
            "this process may reserve {limit} alone (set_per_process_memory_fraction): raise that",
            limit=format_bytes(message.limit_bytes),
        )
    if message.others_bytes >= message.asked_bytes:
        yield say(
            "other processes hold {others}: end them (nvidia-smi lists them), and it fits",
            others=format_bytes(message.others_bytes),
        )
    if message.is_fragmented and message.unused_bytes is not None:
        yield say(
            "PyTorch holds {unused} that no tensor uses, in pieces smaller than {asked}: start "
            "with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which joins them",
            unused=format_bytes(message.unused_bytes),
            asked=asked,
        )
    if message.missing_bytes:
        yield say(
            "{missing} are missing for this allocation alone, and later ones of the step may need "
            "more: halve the micro-batch and double the gradient accumulation (the same result), "
            "or turn gradient checkpointing on",
            missing=format_bytes(message.missing_bytes),
        )
    yield say(
        "what the whole step needs is predicted by: fitune plan --gpu CARD -- python YOUR_SCRIPT.py"
    )
