"""Starts, stops and resumes runs, each a process of its own.

A run is the process that `fitune train` would be: the same arguments, in a session of its own, so
neither Ctrl-C in the board's terminal nor the end of the board ends it. It is stopped as Ctrl-C
stops it: by a signal after which it finishes its step, saves, and ends.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import fitune
from fitune.board.commands import settings_text, train_arguments
from fitune.board.place import run_in
from fitune.board.planning import SettingsBody, plain_settings
from fitune.board.requests import read_body
from fitune.boundary import bounded
from fitune.config import read_config
from fitune.errors import RunDirectoryError, UsageError
from fitune.language import translated
from fitune.plain_files import read_plain
from fitune.run.directory import RunDirectory, list_runs
from fitune.run.lock import holder_here

#: of what a process has printed, the end is read
_TAIL_BYTES = 20_000
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)


class RunBody(BaseModel):
    """Names a run in the directory of the board."""

    model_config = ConfigDict(extra="forbid")

    run: Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True)
class StartedProcess:
    """A process that the board has started."""

    number: int
    kind: Literal["start", "resume"]
    #: as text that a shell understands
    command: str
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def error(self) -> str:
        """The error that it ended with, in the language of `choose_language`; else empty."""
        code = self.process.poll()
        if not code or code in _INTERRUPTED:
            return ""
        lines = read_plain(self.log)[-_TAIL_BYTES:].decode(errors="replace").splitlines()
        begin = next((n for n, line in enumerate(lines) if line.startswith("error: ")), None)
        if begin is None:
            return translated(f"the process of the run ended with exit code {code}")
        said = [lines[begin].removeprefix("error: "), *lines[begin + 1 :]]
        return "\n".join(map(translated, said))


class Launcher:
    """Starts processes and remembers them as long as the board runs.

    logs: a directory for what they print.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._launches: list[StartedProcess] = []
        self._stopped: set[tuple[Path, int]] = set()

    def launch(self, kind: Literal["start", "resume"], arguments: Sequence[str]) -> StartedProcess:
        """Start `fitune ARGUMENTS`."""
        number = len(self._launches)
        log = self._logs / f"{number}.log"
        # the process must import this fitune, even if it is not installed
        here = str(Path(fitune.__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
            "FITUNE_LANG": "en",  # its errors are translated where they are shown
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fitune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        launch = StartedProcess(number, kind, shlex.join(["fitune", *arguments]), process, log)
        self._launches.append(launch)
        return launch

    def launches(self, directory: Path) -> list[dict[str, object]]:
        """Return the processes that were started, each with its run in `directory`."""
        runs = {
            pid: record.run.name
            for record in (list_runs(directory) if directory.is_dir() else ())
            if (pid := holder_here(record.run.lock)) is not None
        }
        return [
            {
                "number": launch.number,
                "kind": launch.kind,
                "command": launch.command,
                "run": runs.get(launch.process.pid),
                "exit_code": launch.process.poll(),
                "error": launch.error,
            }
            for launch in self._launches
        ]

    def stop(self, run: RunDirectory) -> None:
        """Let the process of the run finish its step, save, and end.

        Further calls change nothing, because a second signal would end it at once. Raises
        RunDirectoryError if no process of this machine works on the run.
        """
        if sys.platform == "win32":
            raise RunDirectoryError(
                f"on Windows a run is stopped by Ctrl-C in its own window: {run.path}"
            )
        pid = holder_here(run.lock)
        if pid is None:
            raise RunDirectoryError(
                f"no process of this machine works on {run.path}: there is nothing to stop here"
            )
        if (run.path, pid) not in self._stopped:
            self._stopped.add((run.path, pid))
            os.kill(pid, signal.SIGTERM)


def routes(directory: Path, launcher: Launcher) -> list[BaseRoute]:
    """Return the routes that start, stop and resume runs in `directory`."""

    @bounded("fitune board")
    def processes(request: Request) -> Response:
        return JSONResponse({"processes": launcher.launches(directory)})

    async def start(request: Request) -> Response:
        body = await read_body(request, SettingsBody)
        return await run_in_threadpool(start_run, body)

    @bounded("fitune board")
    def start_run(body: SettingsBody) -> Response:
        settings = plain_settings(body.settings) | {"run.output": str(directory)}
        if "data.train" not in settings:
            raise UsageError("no data is chosen: a run needs data.train")
        read_config(None, settings_text(settings))
        launch = launcher.launch("start", train_arguments(settings))
        return JSONResponse({"number": launch.number, "command": launch.command})

    async def resume(request: Request) -> Response:
        run = run_in(directory, (await read_body(request, RunBody)).run)
        if holder_here(run.lock) is not None:
            raise RunDirectoryError(f"{run.path} is running already")
        launch = launcher.launch("resume", ["train", "--resume", str(run.path)])
        return JSONResponse({"number": launch.number, "command": launch.command})

    async def stop(request: Request) -> Response:
        run = run_in(directory, (await read_body(request, RunBody)).run)
        launcher.stop(run)
        return JSONResponse({"run": run.name})

    return [
        Route("/api/processes", processes),
        Route("/api/start", start, methods=["POST"]),
        Route("/api/resume", resume, methods=["POST"]),
        Route("/api/stop", stop, methods=["POST"]),
    ]
