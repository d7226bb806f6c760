"""Implement `fitune config`, which prints the JSON schema and imports other configurations."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from fitune.cli.examples import examples
from fitune.cli.output import make_directory, output_file, print_aside, print_text
from fitune.config import json_schema
from fitune.config.importers.read import FROM_NAMES, read_command, read_tool_file
from fitune.config.importers.translate import ImportedConfig, translate
from fitune.errors import UsageError
from fitune.language import say, translated
from fitune.language.printable import json_text
from fitune.run.files import write_atomically

app = App(name="config", help_prologue=examples("config"), help_format="plaintext")


@app.command
def schema() -> None:
    """JSON schema of the configuration file, for editors: every key with its default and allowed values.

    In VS Code and others with the YAML language server: save it as fitune.schema.json and start the file with
    `# yaml-language-server: $schema=fitune.schema.json`.
    """
    print_text(json_text(json_schema(), indent=2))


@app.command(
    name="import",
    usage="fitune config import FILE [OPTIONS]   or   fitune config import [OPTIONS] -- COMMAND",
    help="Another trainer's configuration as fitune's: LLaMA-Factory, ms-swift, axolotl, TRL, "
    "transformers, minimind. The YAML says where each value comes from; what means something else "
    "here, what has no counterpart and what makes no difference is listed on stderr, so that "
    "nothing vanishes.",
)
def import_(
    *words: Annotated[
        str, Parameter(name="FILE", help="a file, or after -- the command that starts the training")
    ],
    output: Annotated[
        str | None,
        Parameter(name=("--output", "-o"), metavar="PATH", help="where to; must not exist yet"),
    ] = None,
    model: Annotated[
        str | None, Parameter(help="in place of the model that it names", metavar="MODEL")
    ] = None,
    data: Annotated[
        str | None, Parameter(help="in place of the data that it names", metavar="PATH")
    ] = None,
    from_: Annotated[
        str | None,
        Parameter(
            name="--from",
            metavar="TOOL",
            help=f"whose it is, where two could be meant: {', '.join(FROM_NAMES)}",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        Parameter(
            validator=Number(gte=1), help="how many GPUs trained together, where it does not tell"
        ),
    ] = None,
) -> None:
    """Print or write another trainer's configuration as a fitune configuration."""
    if not words:
        raise UsageError(
            "nothing to import: give a file, or after -- the command that starts the training"
        )
    path = None if output is None else output_file(output, example="sft.yaml")
    if path is not None and path.exists():
        raise UsageError(f"{output} exists: give another place with -o, or remove it yourself")
    if from_ is not None and from_ not in FROM_NAMES:
        raise UsageError(f"--from {from_}: give one of {', '.join(FROM_NAMES)}")
    tool = None if from_ is None else FROM_NAMES[from_]
    arguments = (
        read_tool_file(Path(words[0]), tool=tool)
        if len(words) == 1
        else read_command(words, tool=tool)
    )
    imported = translate(arguments, devices=devices, model=model, data=data)
    if path is None:
        print_text(imported.text, end="")
    else:
        make_directory(path.parent, flag="-o")
        write_atomically(path, imported.text, place="-o")
    _print_report(imported, arguments.source)
    if path is not None:
        print_aside(
            say("{path} is written; next: {commands}", path=path, commands=next_commands(path))
        )


def next_commands(path: Path) -> str:
    return "   ".join(
        f"fitune {verb} {shlex.quote(str(path))}" for verb in ("check", "plan", "train")
    )


def _print_report(imported: ImportedConfig, source: str) -> None:
    what = "the command" if source == "command" else source
    print_aside(translated(f"{what} is of {imported.tool}"))
    by_reason: dict[str, list[str]] = {}
    for name, reason in imported.not_needed.items():
        by_reason.setdefault(reason, []).append(name)
    for heading, messages in (
        ("means something else here:", imported.differs),
        ("has no counterpart here, and is left out:", imported.dropped),
        (
            "makes no difference here:",
            [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()],
        ),
    ):
        if messages:
            for line in (heading, *(f"  {message}" for message in messages)):
                print_aside(translated(line))
