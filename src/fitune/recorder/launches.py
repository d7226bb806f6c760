"""Notice where a script starts the training in another process, as the commands of trainers do.

`trl sft`, `axolotl train` and `llamafactory-cli train` read their arguments and start Python,
`torchrun` or `accelerate launch`, which trains. What they start is recorded in their place. What
ends without a step, such as a script that prepares data, has run in this way, and the script that
started it goes on.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fitune.errors import UsageError

_VARIABLE = re.compile(r"[A-Za-z_]\w*=")
_PYTHON = re.compile(r"python[\d.]*$")
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun")
#: Modules that are run by `python -m` and train nothing
_TOOLS = ("pip", "venv", "ensurepip", "site", "compileall", "torch.utils.collect_env")


#: What is behind the path of the recording in the name of the file by which a command is handed
#: over, and of the one by which it is handed back
LAUNCH_FILES = ("launch", "launched")


class NoStepError(UsageError):
    """A script has ended, by itself and without an error, before its first optimizer step."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that a script has started."""

    words: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    #: whether the script ends where the command begins, as with `os.execv`
    replaces: bool


#: Takes a command over. Returns, if the command has made no step, the file of what it has printed.
Follow = Callable[[Launch], Path]


@contextmanager
def launches_followed(follow: Follow) -> Iterator[None]:
    """Hand over what this block starts by `subprocess` or `os`, if it is a Python script."""
    start: Callable[..., None] = subprocess.Popen.__init__
    run_in_shell = os.system

    def popen(self: object, args: object, *others: object, **options: Any) -> None:
        launch = _script_of(args, options.get("cwd"), options.get("env"))
        if launch is None:
            start(self, args, *others, **options)
            return
        # the process that the script sees prints what the command has printed
        of_command = ("cwd", "env", "shell", "executable")
        rest = {name: value for name, value in options.items() if name not in of_command}
        start(self, ["cat", str(follow(launch))], *others, **rest)

    def system(command: str) -> int:
        is_followed = _script_of(command) is not None
        return subprocess.call(command, shell=True) if is_followed else run_in_shell(command)

    def replacing(call: Callable[..., object]) -> Callable[..., object]:
        def execute(file: object, args: object, env: Any = None) -> object:
            if (launch := _script_of(args, environment=env, replaces=True)) is not None:
                return follow(launch)
            return call(file, args) if env is None else call(file, args, env)

        return execute

    with ExitStack() as stack:
        stack.enter_context(patch.object(subprocess.Popen, "__init__", popen))
        stack.enter_context(patch.object(os, "system", system))
        for name in ("execv", "execve", "execvp", "execvpe"):
            stack.enter_context(patch.object(os, name, replacing(getattr(os, name))))
        yield


def _script_of(
    command: object, directory: Any = None, environment: Any = None, *, replaces: bool = False
) -> Launch | None:
    """Return the script that a command starts by Python or by a launcher, None for others."""
    words = _words(command)
    if not _is_script(words):
        return None
    variables = os.environ if environment is None else environment
    return Launch(
        tuple(words),
        os.getcwd() if directory is None else os.path.abspath(os.fsdecode(directory)),
        {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()},
        replaces,
    )


def _words(command: object) -> list[str]:
    if isinstance(command, str):
        try:
            return shlex.split(command)
        except ValueError:
            return []
    if isinstance(command, Sequence) and all(
        isinstance(word, (str, bytes, os.PathLike)) for word in command
    ):
        return [os.fsdecode(word) for word in command]
    return []


def _is_script(words: Sequence[str]) -> bool:
    words = [*dropwhile(_VARIABLE.match, words)]
    if not words:
        return False
    program, rest = Path(words[0]).name, words[1:]
    if program in _LAUNCHERS:
        return program != "accelerate" or rest[:1] == ["launch"]
    if not _PYTHON.match(program):
        return False
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        rest.pop(0)
    if rest[:1] == ["-m"]:
        return len(rest) > 1 and rest[1] not in _TOOLS
    return bool(rest) and rest[0] != "-c"
