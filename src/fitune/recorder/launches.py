"""Notice where a script starts the training in another process, as the commands of trainers do.

`trl sft`, `axolotl train` and `llamafactory-cli train` read their arguments and start Python,
`torchrun` or `accelerate launch`, which trains. What they start is recorded in their place.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

_PYTHON = re.compile(r"python[\d.]*$")
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun")
#: Modules that are run by `python -m` and train nothing
_TOOLS = ("pip", "venv", "ensurepip", "site", "compileall", "torch.utils.collect_env")


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that a script has started."""

    words: tuple[str, ...]
    directory: str
    environment: dict[str, str]


#: Takes a command over, and does not return
Follow = Callable[[Launch], NoReturn]


@contextmanager
def launches_followed(follow: Follow) -> Iterator[None]:
    """Hand over what this block starts by `subprocess` or `os.exec*`, if it is a Python script."""
    start: Callable[..., None] = subprocess.Popen.__init__

    def popen(self: object, args: object, *others: object, **options: Any) -> None:
        _follow_script(args, options.get("cwd"), options.get("env"), follow)
        start(self, args, *others, **options)

    def replacing(call: Callable[..., object]) -> Callable[..., object]:
        def execute(file: object, args: object, env: Any = None) -> object:
            _follow_script(args, None, env, follow)
            return call(file, args) if env is None else call(file, args, env)

        return execute

    with ExitStack() as stack:
        stack.enter_context(patch.object(subprocess.Popen, "__init__", popen))
        for name in ("execv", "execve", "execvp", "execvpe"):
            stack.enter_context(patch.object(os, name, replacing(getattr(os, name))))
        yield


def _follow_script(command: object, directory: Any, environment: Any, follow: Follow) -> None:
    words = _words(command)
    if not _is_script(words):
        return
    variables = os.environ if environment is None else environment
    follow(
        Launch(
            tuple(words),
            os.getcwd() if directory is None else os.path.abspath(os.fsdecode(directory)),
            {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()},
        )
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
    """Return whether these words start a script by Python, or by a launcher."""
    if not words:
        return False
    program, rest = Path(words[0]).name, list(words[1:])
    if program in _LAUNCHERS:
        return program != "accelerate" or rest[:1] == ["launch"]
    if not _PYTHON.match(program):
        return False
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        rest.pop(0)
    if rest[:1] == ["-m"]:
        return len(rest) > 1 and rest[1] not in _TOOLS
    return bool(rest) and rest[0] != "-c"
