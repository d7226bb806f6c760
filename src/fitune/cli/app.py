"""Define the command `fitune` and its verbs, and turn errors into exit codes.

    0 success    1 failure    2 wrong usage, configuration or data    3 does not fit
    4 out of memory after all retries    75 temporary failure: start again    130 interrupted
    141 broken pipe

Each verb is a module of this package. It is imported only when it is called, so that
`fitune --help` stays fast.
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
from fitune.boundary import is_debugging, unexpected
from fitune.cli.examples import examples
from fitune.cli.help_text import HelpText
from fitune.cli.output import print_aside
from fitune.config.importers.names import hint_for_name
from fitune.errors import FituneError
from fitune.language import say, translated

INTERRUPTED = 130
BROKEN_PIPE = 141

#: Verb -> its help, in the order in which `fitune --help` lists them.
VERBS = {
    "env": "The machine: cards, memory, driver, versions.",
    "check": "What the data is: format, template, supervised share, lengths, samples cut or lost.",
    "plan": "Predicted memory and time of each setting; the fastest that fits, and why not the others.",
    "explain": "What a message that the card ran out of memory means, and what helps.",
    "train": "Train by a configuration.",
    "sweep": "Several configurations one after another, then compared.",
    "watch": "A run live, or as it ended: progress, memory, loss, events.",
    "board": "A page in the browser: plan, start, watch and compare runs.",
    "runs": "The runs here, one line each.",
    "compare": "Runs side by side, at equal tokens.",
    "advise": "What to change in a run, best first.",
    "report": "Runs as one offline HTML page.",
    "chat": "A conversation with the fine-tuned model.",
    "export": "A run's weights for use elsewhere.",
    "config": "About configuration files.",
    "demo": "The whole story here in minutes: real model, real data.",
}
#: The command behind `fitune plan ... -- COMMAND`; its module is imported when it is called
SCRIPT_VERB = "plan-script"
#: Usage lines of the verbs that take a configuration.
USAGES = {
    "check": "fitune check DATA|CONFIG [KEY.SUB=VALUE...] [OPTIONS]",
    "plan": "fitune plan [CONFIG] [KEY.SUB=VALUE...] [OPTIONS] [-- COMMAND OF A TRAINING SCRIPT]",
    "train": "fitune train [CONFIG] [KEY.SUB=VALUE...] [OPTIONS]",
    "sweep": "fitune sweep CONFIG [KEY.SUB=VALUE...] [OPTIONS]",
}

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
for position, (verb, what) in enumerate(VERBS.items(), start=1):
    if verb == "config":  # has verbs of its own
        app.command("fitune.cli.config_command:app", name=verb, help=what, sort_key=position)
        continue
    app.command(
        f"fitune.cli.{verb}:{verb}",
        help_prologue=examples(verb),
        usage=USAGES.get(verb),
        help=what,
        sort_key=position,
    )


app.command(
    "fitune.cli.plan_script:plan_script",
    name=SCRIPT_VERB,
    help_prologue=examples("plan"),
    usage="fitune plan --gpu CARD [OPTIONS] -- python SCRIPT.py [ARGUMENTS]",
    help="Predicted memory of a training script of your own, unchanged.",
    show=False,
)
app.register_install_completion_command(
    group="Shell completion",
    help="Install completion for this shell (bash, zsh, fish, PowerShell); then open a new one.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fitune ARGUMENTS` (by default those of sys.argv) and return its exit code.

    Prints one line on stderr for each error, including unexpected exceptions. FITUNE_DEBUG=1 adds
    tracebacks and the warnings of libraries.
    """
    if arguments is None and not is_debugging():
        _silence_libraries()
    try:
        app(
            _normalise(sys.argv[1:] if arguments is None else arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        return _fail([_usage_message(error)], exit_code=2)
    except FituneError as error:
        return _fail(str(error).split("\n") if str(error) else [], error.exit_code)
    except KeyboardInterrupt:
        return _fail(["interrupted"], INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        failure = unexpected(error, f"fitune {_verb(arguments)}".strip())
        return _fail(str(failure).splitlines(), failure.exit_code)


def _verb(arguments: Sequence[str] | None) -> str:
    given = list(sys.argv[1:] if arguments is None else arguments)
    return next((word for word in given if not word.startswith("-")), "")


def _silence_libraries() -> None:
    """Suppress warnings of libraries, because fitune reports what went wrong itself."""
    # torch warns of each failed allocation, from which training recovers.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _normalise(arguments: Sequence[str]) -> list[str]:
    """Replace 'help VERB' and 'version', which other programs accept, by the flags for them.

    `plan ... -- COMMAND` predicts a script, which is a command of its own here.
    """
    match list(arguments):
        case ["help", *verb]:
            return [*verb, "--help"]
        case ["version"]:
            return ["--version"]
        case ["plan", *words] if "--" in words:
            return [SCRIPT_VERB, *words]
        case words:
            return words


def _fail(messages: Sequence[str], exit_code: int) -> int:
    if is_debugging():
        print_aside(traceback.format_exc())
    for message in messages:
        text = translated(message)
        # An indented line is a detail of the error in the line before it.
        print_aside(text if text.startswith(" ") else say("error: {sentence}", sentence=text))
    return exit_code


def _usage_message(error: CycloptsError) -> str:
    message = " ".join(str(error).split())
    if (
        isinstance(error, CoercionError)
        and error.token is not None
        and error.token.keyword == "--gpus"
    ):
        return f"--gpus is how many cards; one by its name is --gpu '{error.token.value}'"
    if isinstance(error, UnknownOptionError):
        if match := re.match(r"Unknown option: -(\w[\w-]+)", message):
            return f"Unknown option: -{match[1]}: a flag of several letters begins with two dashes, --{match[1]}"
        name = (error.token.keyword or error.token.value).partition("=")[0]
        if hint := hint_for_name(name):
            return f"{message} It is {hint}."
        if "." in name:
            return f"{message} A key of the configuration is given without dashes: {name.lstrip('-')}=VALUE"
    return message
