"""Predict the memory of a training script of somebody else's, as the command is typed.

The script runs in its own interpreter, without GPU, until it has made some optimizer steps
(`recorder.child`). What it allocates there is replayed here.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fitune import errors
from fitune.allocator.prediction import Prediction, PredictSettings, predict_trace
from fitune.boundary import bounded, is_debugging
from fitune.errors import FituneError, UnexpectedError, UsageError
from fitune.machine.cards import Device
from fitune.machine.devices import find_device, this_machine
from fitune.planning.launchers import LAUNCHER_MODULES, LAUNCHERS, after_launcher
from fitune.recorder.child import BOOT
from fitune.recorder.events import ALLOCATOR, MemoryTrace
from fitune.recorder.launches import LAUNCH_FILES, NoStepError
from fitune.recorder.recording import RecordedEvents
from fitune.recorder.transfer import read_recording

Rows = Literal["longest", "as-they-come"]

_PYTHON = re.compile(r"python(\d(\.\d+)?)?$")
#: Environment variables by which a script would take itself for one of several processes
_PROCESS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: What keeps libraries from the network and from trackers
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "SWANLAB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
#: Lines of the script's own output that an error shows
_LAST_LINES = 3


@dataclass(frozen=True)
class ScriptCommand:
    """A command that trains, taken apart."""

    #: None for the interpreter that `python` names here
    python: str | None
    #: the file of the script, or the name of a module
    name: str
    is_module: bool
    arguments: tuple[str, ...]
    #: variables that stand before the command, such as CUDA_VISIBLE_DEVICES=0
    variables: tuple[tuple[str, str], ...] = ()

    def words(self) -> list[str]:
        """Return the command as words, without a launcher."""
        return [
            *(f"{name}={value}" for name, value in self.variables),
            *([self.python] if self.python is not None else []),
            *(["-m"] if self.is_module else []),
            self.name,
            *self.arguments,
        ]

    def with_argument(self, name: str, value: str) -> "ScriptCommand":
        """Return the command with another value of an argument, which may be new in it.

        It is found as `--name value`, `--name=value` and `name=value`, with dashes or underscores.
        """
        spellings = {f"--{name}", f"-{name}", f"--{name.replace('_', '-')}", name}
        arguments = list(self.arguments)
        for place, word in enumerate(arguments):
            key, equals, _ = word.partition("=")
            if key in spellings and equals:
                arguments[place] = f"{key}={value}"
                break
            if key in spellings and place + 1 < len(arguments):
                arguments[place + 1] = value
                break
        else:
            arguments += [f"--{name}", value]
        return replace(self, arguments=tuple(arguments))


def read_script_command(words: Sequence[str]) -> ScriptCommand:
    """Take a command apart: `[NAME=VALUE] [torchrun ...] [python] [-m] SCRIPT [ARGUMENTS]`.

    Raises UsageError for a command that starts no Python script, or several processes.
    """
    rest, variables, python = list(words), [], None
    while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
        name, _, value = rest.pop(0).partition("=")
        variables.append((name, value))
    is_module = False
    while rest:
        program = Path(rest[0]).name
        if _PYTHON.match(program):
            python = rest.pop(0)
            while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
                rest.pop(0)
            if rest and rest[0] == "-c":
                raise UsageError("python -c has no script: put the code into a file")
        elif program in LAUNCHERS:
            launcher = shutil.which(rest[0])
            python = python or (None if launcher is None else _interpreter_of(launcher))
            rest, handed_on = after_launcher(rest)
            variables += handed_on
        elif program in ("uv", "poetry", "pdm") and rest[1:2] == ["run"]:
            rest = rest[2:]
            continue
        elif program in ("deepspeed", "mpirun", "srun"):
            raise UsageError(
                f"{program} starts several processes, and a prediction is of one: give the command "
                "that one of them runs"
            )
        else:
            break
        if rest[1:] and rest[0] in ("-m", "--module"):
            if rest[1] in LAUNCHER_MODULES:
                rest = [*LAUNCHER_MODULES[rest[1]].split(), *rest[2:]]
                continue
            is_module = True
            rest.pop(0)
            break
        if python is not None:
            break
    if not rest:
        raise UsageError("no script behind --: write fitune plan --gpu CARD -- python SCRIPT.py")
    name, *arguments = rest
    return ScriptCommand(python, name, is_module, tuple(arguments), tuple(variables))


@bounded("fitune.predict_script")
def predict_script(
    command: Sequence[str] | str,
    *,
    gpu: str | None = None,
    python: str | None = None,
    cwd: str | Path | None = None,
    num_steps: int = 2,
    rows: Rows = "longest",
) -> Prediction:
    """Predict the memory of a training script, unchanged, without a GPU, weights or data.

    command: the words of the command, such as ["python", "train.py", "--batch_size", "6"], with or
        without `python`, `torchrun --nproc_per_node=1` or `accelerate launch`; or the path of a
        notebook, whose cells are run in their order.
    gpu: a card of the catalogue; None for this machine's card.
    python: the interpreter that runs the script; None for the one that would run the command.
    cwd: the directory in which the command is run; None for the current one.
    num_steps: the optimizer steps to record. All figures are those of the last one; `step_peaks`
        has the peak of each.
    rows: "longest" lets data loaders begin with the longest samples, "as-they-come" leaves them.

    Raises UsageError for an unknown card, for a command that starts no Python script, and for a
    script that fails before it has made an optimizer step.
    """
    words = [command] if isinstance(command, str) else list(command)
    device = card_of(gpu)
    recorded = record_command(
        read_script_command(words), device, python=python, cwd=cwd, num_steps=num_steps, rows=rows
    )
    settings = [each for each in recorded.source if each.startswith(ALLOCATOR)]
    allocator = settings[0].removeprefix(ALLOCATOR) if settings else ""
    return predict_trace(recorded, PredictSettings(device=device, allocator=allocator))


def card_of(gpu: str | None) -> Device:
    """Return the card of this name, or this machine's. Raises UsageError if there is none."""
    device = find_device(gpu) if gpu is not None else next(iter(this_machine()), None)
    if device is None or device.kind != "cuda":
        raise UsageError(
            "a script is predicted for an NVIDIA card: name one, such as --gpu 'RTX 4090'"
        )
    return device


def record_command(
    command: ScriptCommand,
    device: Device,
    *,
    python: str | None = None,
    cwd: str | Path | None = None,
    num_steps: int = 2,
    rows: Rows = "longest",
) -> MemoryTrace:
    """Run the command in a process of its own until it has made `num_steps` optimizer steps.

    Raises what `predict_script` raises.
    """
    directory = Path(cwd or ".").absolute()
    if not directory.is_dir():
        raise UsageError(f"--cwd {cwd} is no directory: give the one that the command is run in")
    if num_steps < 1:
        raise UsageError(f"--steps {num_steps} records nothing: give 1 or more")
    with tempfile.TemporaryDirectory(prefix="fitune-script-") as place:
        # symlinks of the system, such as macOS' /tmp, would make two paths of one file
        scratch = Path(place).resolve()
        request = {
            "target": _target(device),
            "num_steps": num_steps,
            "rows": rows,
            "scratch": str(scratch),
            "result": str(scratch / "recording.npz"),
        }
        return _run(command, directory, os.environ, request, python)


def _run(
    command: ScriptCommand,
    directory: Path,
    environment: Mapping[str, str],
    request: dict[str, Any],
    python: str | None,
    num_launches: int = 0,
) -> MemoryTrace:
    """Return what was recorded of the command, or of the one that it starts.

    num_launches: how many commands, one started by the other, have led to this one
    """
    if num_launches == _MOST_LAUNCHES:
        raise UsageError(
            f"the command starts another one, and so on {_MOST_LAUNCHES} times: give the script "
            "that trains"
        )
    scratch, result = Path(request["scratch"]), Path(request["result"])
    name, interpreter = _find_script(command, directory, scratch, python)
    request |= {"name": name, "is_module": command.is_module, "arguments": command.arguments}
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    output = scratch / f"output{num_launches}.txt"
    arguments = [interpreter, "-c", BOOT, str(_DIRECTORY), str(scratch / "request.json")]
    launch, answer = (result.with_name(f"{result.name}.{name}") for name in LAUNCH_FILES)
    with (
        output.open("wb") as written,
        _started(
            arguments,
            directory,
            _environment(environment, command, scratch),
            None if is_debugging() else written,
        ) as process,
    ):
        while not _has_ended(process):
            if not launch.exists():
                continue
            started = json.loads(launch.read_text(encoding="utf-8"))
            launch.unlink()
            try:
                return _run(
                    read_script_command(started["words"]),
                    Path(started["directory"]),
                    started["environment"],
                    request,
                    python,
                    num_launches + 1,
                )
            except NoStepError:
                if started["replaces"]:
                    raise
                answer.write_text(str(scratch / f"output{num_launches + 1}.txt"), encoding="utf-8")
    return _read_result(scratch, process.returncode, output, interpreter)


#: A command of a trainer may start accelerate, which starts Python
_MOST_LAUNCHES = 4
_ASKS_EVERY_SECONDS = 0.05
_DIRECTORY = Path(__file__).parent.parent


def _target(device: Device) -> dict[str, object]:
    return {
        "compute_capability": device.compute_capability or (8, 0),
        "name": device.name,
        "total_bytes": device.total_bytes,
        "multiprocessors": device.multiprocessors,
    }


def _find_script(
    command: ScriptCommand, directory: Path, scratch: Path, python: str | None
) -> tuple[str, str]:
    """Return the script and the interpreter that runs it. Raises UsageError if there is none."""
    named = python or command.python
    interpreter = sys.executable if named is None else shutil.which(named)
    if interpreter is None:
        raise UsageError(f"there is no {named} here: name the interpreter with --python")
    if command.is_module:
        return command.name, interpreter
    path = directory / command.name
    if path.suffix == ".ipynb" and path.is_file():
        return str(_script_of_notebook(path, scratch)), interpreter
    if path.is_file():
        return command.name, interpreter
    # a command that a package has installed, such as `trl sft`
    beside = None if named is None else str(Path(interpreter).parent)
    installed = shutil.which(command.name, path=beside) or shutil.which(command.name)
    if installed is not None and command.python is None:
        its_own = _interpreter_of(installed)
        if its_own is None:
            raise UsageError(f"{command.name} is no Python script: give the script that it starts")
        return installed, its_own if python is None else interpreter
    raise UsageError(
        f"there is no script {command.name} in {directory}: give --cwd the directory in which the "
        "command is run"
    )


def _interpreter_of(program: str) -> str | None:
    """Return the Python that runs an installed command, None if it is none of Python's."""
    with open(program, "rb") as file:
        first, _, rest = file.read(4096).decode(errors="replace").partition("\n")
    if first.startswith("#!") and "python" in first:
        return first[2:].split()[-1]
    # pip writes this where the path of the interpreter is too long for the first line
    through_sh = re.match(r"'''exec' \"?([^\"\n]+?)\"? \"\$0\"", rest)
    return None if through_sh is None else through_sh[1]


def _script_of_notebook(path: Path, scratch: Path) -> Path:
    """Write the code cells of a notebook as a script, without the commands of IPython."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a notebook ({error}): save it again") from error
    lines = []
    for number, code in enumerate(codes, start=1):
        if code.lstrip().startswith("%%"):
            continue
        lines.append(f"# cell {number}")
        lines += [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in code.splitlines()]
    script = scratch / f"{path.stem}.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return script


def _environment(
    inherited: Mapping[str, str], command: ScriptCommand, scratch: Path
) -> dict[str, str]:
    variables = {name: value for name, value in inherited.items() if name not in _PROCESS_VARIABLES}
    caches = {
        name: str(scratch / name.lower())
        for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    }
    return variables | dict(command.variables) | _OFFLINE | caches | {"TMPDIR": str(scratch)}


@contextlib.contextmanager
def _started(
    arguments: list[str], directory: Path, environment: dict[str, str], output: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process, and end it where this block ends before it."""
    try:
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output if output is not None else sys.stderr.fileno(),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"{arguments[0]} cannot be started: {error.strerror}") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait a moment for the process to end."""
    try:
        process.wait(_ASKS_EVERY_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read_result(scratch: Path, code: int, output: Path, python: str) -> MemoryTrace:
    """Return what the process recorded. Raises the error that it met."""
    result = scratch / "recording.npz"
    error = result.with_name(result.name + ".error")
    if result.exists():
        recording = read_recording(result)
        return MemoryTrace(RecordedEvents(recording), recording.source)
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = f". It printed: {' / '.join(lines[-_LAST_LINES:])}" if lines else ""
    if error.exists():
        met = json.loads(error.read_text(encoding="utf-8"))
        error.unlink()
        message = met["message"] + (said if met["shows_output"] else "")
        if met["has_ended"]:
            raise NoStepError(message)
        kind = getattr(errors, met["kind"], UnexpectedError)
        raise kind(message) if issubclass(kind, FituneError) else UsageError(message)
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise UnexpectedError(f"{python}, which ran the script, {ended} before a training step{said}")


# ---- one argument, several values ----


@dataclass(frozen=True)
class Variation:
    """The prediction of the command with one value of the argument that varies."""

    value: int
    prediction: Prediction


def vary_script(
    predict: Callable[[int], Prediction], values: Sequence[int], *, search: bool
) -> list[Variation]:
    """Predict the command for several values of an argument, by rising value.

    values: all that are to be predicted; with `search`, the range in which the largest value that
        fits is looked for by bisection, as memory rises with the value.
    """
    found: dict[int, Prediction] = {}

    def fits(value: int) -> bool:
        if value not in found:
            found[value] = predict(value)
        return found[value].fits is True

    if not search:
        for value in values:
            fits(value)
    else:
        low, high = min(values), max(values)
        if fits(low) and not fits(high):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
    return [Variation(value, found[value]) for value in sorted(found)]
