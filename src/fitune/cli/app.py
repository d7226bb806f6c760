"""The command `fitune`: its verbs, and the one place where errors become exit codes.

    0 ok   1 failed   2 usage, configuration or data   3 does not fit   4 out of memory after all retries
    75 start me again   130 interrupted   141 the reader of our output is gone

A verb is a module of this package, imported when it is called, so that `fitune --help` imports none of them.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from cyclopts import App, CoercionError, CycloptsError, Parameter, UnknownOptionError

from fitune import __version__
from fitune.boundary import unexpected
from fitune.cli.examples import examples
from fitune.cli.help_text import HelpText
from fitune.cli.output import print_aside
from fitune.config.foreign_names import foreign_hint
from fitune.errors import FituneError
from fitune.language import say, translated

INTERRUPTED = 130
BROKEN_PIPE = 141

app = App(
    name="fitune",
    help="Fine-tune a language model inside the memory you have.",
    help_prologue=examples(""),
    help_epilogue=translated("A verb's own help: fitune VERB --help"),
    help_format="plaintext",
    help_formatter=HelpText(),
    version=__version__,
    default_parameter=Parameter(negative=(), show_default=False),
    suppress_keyboard_interrupt=False,
)
app.command(
    "fitune.cli.env:env",
    help_prologue=examples("env"),
    help="The machine: cards, memory, driver, versions.",
    sort_key=1,
)
app.command(
    "fitune.cli.check:check",
    help_prologue=examples("check"),
    usage="fitune check DATA|CONFIG [KEY.SUB=VALUE...] [OPTIONS]",
    help="What the data is: format, template, supervised share, lengths, rows cut or lost.",
    sort_key=2,
)
app.command(
    "fitune.cli.plan:plan",
    help_prologue=examples("plan"),
    usage="fitune plan [CONFIG] [KEY.SUB=VALUE...] [OPTIONS]",
    help="Predicted memory and time of each setting; the fastest that fits, and why not the others.",
    sort_key=3,
)
app.command(
    "fitune.cli.train:train",
    help_prologue=examples("train"),
    usage="fitune train [CONFIG] [KEY.SUB=VALUE...] [OPTIONS]",
    help="Train by a configuration.",
    sort_key=4,
)
app.command(
    "fitune.cli.watch:watch",
    help_prologue=examples("watch"),
    help="A run live, or as it ended: progress, memory, loss, events.",
    sort_key=6,
)
app.command(
    "fitune.cli.runs:runs",
    help_prologue=examples("runs"),
    help="The runs here, one line each.",
    sort_key=7,
)
app.command(
    "fitune.cli.sweep:sweep",
    help_prologue=examples("sweep"),
    usage="fitune sweep CONFIG [KEY.SUB=VALUE...] [OPTIONS]",
    help="Several configurations one after another, then compared.",
    sort_key=5,
)
app.command(
    "fitune.cli.compare:compare",
    help_prologue=examples("compare"),
    help="Runs side by side, at equal tokens.",
    sort_key=8,
)
app.command(
    "fitune.cli.advise:advise",
    help_prologue=examples("advise"),
    help="What to change in a run, best first.",
    sort_key=9,
)
app.command(
    "fitune.cli.report:report",
    help_prologue=examples("report"),
    help="Runs as one offline HTML page.",
    sort_key=10,
)
app.command(
    "fitune.cli.export:export",
    help_prologue=examples("export"),
    help="A run's weights for use elsewhere.",
    sort_key=11,
)
app.command(
    "fitune.cli.demo:demo",
    help_prologue=examples("demo"),
    help="The whole story here in minutes: real model, real data.",
    sort_key=13,
)
app.command("fitune.cli.config_command:app", name="config", help="About configuration files.", sort_key=12)


app.register_install_completion_command(
    group="Shell completion",
    help="Install completion for this shell (bash, zsh, fish, PowerShell); then open a new one.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `fitune ARGUMENTS` (sys.argv's by default). What goes wrong is said on stderr, one line a fault,
    also what nobody foresaw; FITUNE_DEBUG=1 adds the traceback and what libraries warn of."""
    if arguments is None and not _debugs():
        _silence_libraries()
    try:
        app(
            _as_meant(sys.argv[1:] if arguments is None else arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        return _fail([_usage_sentence(error)], exit_code=2)
    except FituneError as error:
        return _fail(str(error).split("\n") if str(error) else [], error.exit_code)
    except KeyboardInterrupt:
        return _fail(["interrupted"], INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return BROKEN_PIPE
    except Exception as error:
        told = unexpected(error, f"fitune {_verb(arguments)}".strip())
        return _fail(str(told).splitlines(), told.exit_code)


def _verb(arguments: Sequence[str] | None) -> str:
    given = list(sys.argv[1:] if arguments is None else arguments)
    return next((word for word in given if not word.startswith("-")), "")


def _silence_libraries() -> None:
    """What went wrong is said in a sentence of ours."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a line for each failed allocation, which is survived
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _as_meant(arguments: Sequence[str]) -> list[str]:
    """'help VERB' and 'version', as other commands have them, are flags here."""
    match list(arguments):
        case ["help", *verb]:
            return [*verb, "--help"]
        case ["version"]:
            return ["--version"]
        case words:
            return words


def _fail(sentences: Sequence[str], exit_code: int) -> int:
    if _debugs():
        print_aside(traceback.format_exc())
    for sentence in sentences:  # an indented line is a detail of the sentence before it
        told = translated(sentence)
        print_aside(told if told.startswith(" ") else say("error: {sentence}", sentence=told))
    return exit_code


def _debugs() -> bool:
    return os.environ.get("FITUNE_DEBUG", "0") not in ("", "0")


def _usage_sentence(error: CycloptsError) -> str:
    sentence = " ".join(str(error).split())
    if isinstance(error, CoercionError) and error.token is not None and error.token.keyword == "--gpus":
        return f"--gpus is how many cards; one by its name is --gpu '{error.token.value}'"
    if isinstance(error, UnknownOptionError):
        if match := re.match(r"Unknown option: -(\w[\w-]+)", sentence):
            return f"Unknown option: -{match[1]}: a flag of several letters begins with two dashes, --{match[1]}"
        name = (error.token.keyword or error.token.value).partition("=")[0]
        if hint := foreign_hint(name):
            return f"{sentence} It is {hint}."
        if "." in name:
            return f"{sentence} A key of the configuration is given without dashes: {name.lstrip('-')}=VALUE"
    return sentence
