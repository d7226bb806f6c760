"""Record a script in the process that the user's own interpreter runs for it.

This process has the user's versions of torch and of everything else. Of fitune it imports the
recorder and the messages alone (`BOOT`), from the directory of the fitune that started it.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fitune.boundary import is_debugging
from fitune.errors import FituneError, UsageError
from fitune.recorder.launches import LAUNCH_FILES, Launch, NoStepError

#: Python code that starts this process with (directory of fitune, file of the request)
BOOT = """
import importlib.util, sys
directory, request = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "fitune", directory + "/__init__.py", submodule_search_locations=[directory]
)
sys.modules["fitune"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from fitune.recorder.child import main
main(request)
"""
_ASKS_EVERY_SECONDS = 0.02
#: The oldest PyTorch in which scripts are recorded
OLDEST_TORCH = (2, 6)


def main(request_path: str) -> None:
    """Record the script of a request and write the recording, or why there is none, to files.

    The request is JSON: the fields of `ScriptSettings` and "result", the path of the recording. An
    error is written as JSON to the same path with ".error" behind it, and a command that the script
    starts in its place with ".launch". If the command has made no step, this process finds the path
    of its output in ".launched", and goes on.
    """
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    result = Path(request.pop("result"))
    error = result.with_name(result.name + ".error")
    try:
        _record(request, result)
    except SystemExit as exit_:
        # what it printed says why, such as an argument that it does not know
        _write(
            error,
            f"the script called sys.exit({exit_.code!r}) before its first optimizer step",
            shows_output=True,
            has_ended=exit_.code in (None, 0),
        )
    except NoStepError as reason:
        _write(error, str(reason), has_ended=True)
    except BaseException as reason:
        if is_debugging():
            traceback.print_exc()
        if isinstance(reason, FituneError):
            _write(error, str(reason), type(reason).__name__)
        else:
            _write(error, f"{type(reason).__name__}: {reason}", "UnexpectedError")
    sys.stdout.flush()
    sys.stderr.flush()
    # threads and hooks that the script has left behind are not waited for
    os._exit(0)


def _record(request: dict[str, Any], result: Path) -> None:
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        raise UsageError(
            f"{sys.executable} cannot import {error.name}: activate the environment of the script, "
            "or name its Python with --python"
        ) from error
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise UsageError(
            f"{sys.executable} has torch {torch.__version__}: scripts are predicted with torch 2.6 "
            "and later; name another Python with --python"
        )
    from fitune.recorder.cuda_target import CudaTarget
    from fitune.recorder.script import ScriptSettings, record_script
    from fitune.recorder.transfer import write_recording

    def follow(launch: Launch) -> Path:
        asked, answer = (result.with_name(f"{result.name}.{name}") for name in LAUNCH_FILES)
        whole = asked.with_suffix(".part")
        whole.write_text(json.dumps(dataclasses.asdict(launch)), encoding="utf-8")
        whole.rename(asked)
        # whoever reads it ends this process if the command makes a step
        while not answer.exists():
            time.sleep(_ASKS_EVERY_SECONDS)
        output = Path(answer.read_text(encoding="utf-8"))
        answer.unlink()
        return output

    target = request.pop("target")
    target["compute_capability"] = tuple(target["compute_capability"])
    settings = ScriptSettings(
        **request
        | {
            "target": CudaTarget(**target),
            "arguments": tuple(request["arguments"]),
            "scratch": Path(request["scratch"]),
        }
    )
    record_script(
        settings, done=lambda recording: write_recording(recording, result), follow=follow
    )


def _write(
    path: Path,
    message: str,
    kind: str = "UsageError",
    *,
    shows_output: bool = False,
    has_ended: bool = False,
) -> None:
    content = {
        "kind": kind,
        "message": message,
        "shows_output": shows_output,
        "has_ended": has_ended,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
