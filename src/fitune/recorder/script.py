"""Record somebody else's training script, unchanged, until it has made some optimizer steps.

The script runs whole, as `__main__`, on tensors without data in a process that behaves as if the
card were there. What the script needs and this machine lacks is stood in for, and each stand-in is
named in `MemoryTrace.source`.
"""

import os
import re
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only

from fitune.boundary import cause_of
from fitune.errors import FituneError, UsageError
from fitune.recorder.absent_data import absent_data
from fitune.recorder.assumptions import Assumptions
from fitune.recorder.card_stand_in import card_stands_in
from fitune.recorder.cuda_behaviour import CudaKernels
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import ALLOCATOR, COMPILED
from fitune.recorder.failures import explained
from fitune.recorder.known_data import forget_data
from fitune.recorder.launches import Follow, NoStepError, launches_followed
from fitune.recorder.library_patches import LIBRARIES, own_packages
from fitune.recorder.patience import Patience
from fitune.recorder.record import fake_tensors, is_compiled, process_as_recorded
from fitune.recorder.recorder import Recorder
from fitune.recorder.recording import Recording, versions
from fitune.recorder.scratch_files import ScratchFiles
from fitune.recorder.script_libraries import script_libraries
from fitune.recorder.shape_cache import ShapeMemory
from fitune.recorder.step_ends import EnoughStepsError, StepEnds
from fitune.recorder.worker_processes import Workers

#: Passes of a step without gradients on inputs of the same shapes that are recorded; the others
#: change nothing in the allocator
_EQUAL_PASSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptSettings:
    """A script, its arguments, and how it is recorded."""

    #: the file of the script, or the name of a module
    name: str
    is_module: bool = False
    arguments: tuple[str, ...] = ()
    target: CudaTarget
    num_steps: int = 2
    #: whether data loaders begin with the longest samples, or with those that the script takes
    rows: Literal["longest", "as-they-come"] = "longest"
    #: an empty directory for all files that the script writes
    scratch: Path


def record_script(
    settings: ScriptSettings, *, done: Callable[[Recording], None], follow: Follow
) -> None:
    """Run the script and hand over the recording of its first `num_steps` optimizer steps.

    The recording is shorter if the script ends earlier. The process is of no further use: what the
    script has started or replaced in it stays.

    done: is called with the recording, before the script is ended.
    follow: is called with the command by which the script starts the training in another process.

    Raises UsageError for a script that fails, or that makes no optimizer step.
    """
    noted: dict[str, None] = {}
    note = noted.setdefault
    patience, shapes = Patience(), ShapeMemory()
    assumptions = Assumptions("balanced", shapes, patience)
    recorder = Recorder(CudaKernels(settings.target, assumptions.call))
    files, workers = ScratchFiles(settings.scratch), Workers()
    with ExitStack() as stack:
        compiled = stack.enter_context(process_as_recorded(settings.target, patience))

        def hand_over() -> None:
            notes = [*noted]
            if files.written:
                notes.append("what the script saves is not kept")
            notes += ends.assumptions()
            models = ends.models.values()
            _refuse_processor(recorder, models)
            if compiled or any(is_compiled(model) for model in models):
                notes.append(COMPILED)
            notes += _allocator_settings()
            done(
                recorder.recording(
                    (
                        f"recorded {ends.num_steps} optimizer steps of the script itself",
                        *settings.target.lines(),
                        *assumptions.lines(),
                        *notes,
                        versions(),
                    )
                )
            )

        ends = StepEnds(
            recorder,
            settings.num_steps,
            done=hand_over,
            # the recording is handed over, and a script that catches everything never ends
            give_up=lambda: os._exit(0),
        )
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(fake_tensors(mode, shapes, of_card=True))
        stack.enter_context(absent_data(note))
        stack.enter_context(script_libraries(note, longest=settings.rows == "longest"))
        stack.enter_context(ends.hooks())
        stack.enter_context(recorder.hooks())
        stack.enter_context(recorder)
        stack.enter_context(card_stands_in(recorder))
        stack.enter_context(_equal_passes_skipped(ends, note))
        stack.enter_context(_weights_unknown())
        stack.enter_context(own_packages("__main__", *_package(settings)))
        stack.enter_context(launches_followed(follow))
        stack.enter_context(files.redirected())
        stack.enter_context(workers.forked())
        files.refuse_others()
        try:
            with explained("the script", lambda: bool(assumptions.used)):
                _run(settings)
        except EnoughStepsError:
            return
        except (SystemExit, KeyboardInterrupt, FituneError):
            if ends.num_steps < 1:
                raise
        except BaseException as error:
            if ends.num_steps < 1:
                raise UsageError(_failure(error, settings)) from error
        if ends.num_steps < 1:
            raise NoStepError(
                f"{_shown(settings)} ended after {ends.num_forwards} forward passes without an "
                "optimizer.step() of torch.optim, by which fitune sees where a training step ends"
                + _of_workers(workers.num_started)
            )
        ends.end()
        hand_over()


def _refuse_processor(recorder: Recorder, models: Iterable[nn.Module]) -> None:
    """Raise UsageError if all parameters are in host memory."""
    parameters = [each for model in models for each in model.parameters()]
    if parameters and all(map(recorder.is_on_host, parameters)):
        raise UsageError(
            "the script trains on the processor: none of its parameters is on the card; give it "
            "the argument by which it takes a card, such as --device cuda"
        )


def _allocator_settings() -> list[str]:
    """Say what PyTorch's allocator reads from the environment, which the script may have set."""
    # before PyTorch 2.9 there was the older name alone
    has_new_name = hasattr(torch._C, "_accelerator_setAllocatorSettings")
    names = (*(["PYTORCH_ALLOC_CONF"] if has_new_name else []), "PYTORCH_CUDA_ALLOC_CONF")
    return [f"{ALLOCATOR}{os.environ[name]}" for name in names if os.environ.get(name)][:1]


def _of_workers(number: int) -> str:
    if not number:
        return ""
    return f"; it started {number} processes by multiprocessing, whose steps are not seen"


def _run(settings: ScriptSettings) -> None:
    argv = [settings.name, *settings.arguments]
    first = os.getcwd() if settings.is_module else str(Path(settings.name).resolve().parent)
    with patch.object(sys, "argv", argv), patch.object(sys, "path", [first, *sys.path[1:]]):
        if settings.is_module:
            runpy.run_module(settings.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(settings.name, run_name="__main__")


def _package(settings: ScriptSettings) -> list[str]:
    """Return the top-level package of a trainer that is installed and run as a script."""
    if settings.is_module:
        return [settings.name.partition(".")[0]]
    path = Path(settings.name).resolve()
    if (library := next(iter(LIBRARIES & set(path.parts)), None)) is not None:
        return [path.parts[path.parts.index(library) + 1]]
    if path.suffix == ".py" or not path.is_file():
        return []
    # a command that pip has written imports the function that it calls
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    imported = (re.match(r"from (\w+)[\w.]* import ", line) for line in lines)
    return [found[1] for found in imported if found is not None]


def _shown(settings: ScriptSettings) -> str:
    return settings.name if settings.is_module else Path(settings.name).name


def _failure(error: BaseException, settings: ScriptSettings) -> str:
    """Return the message for an exception of the script: what happened, and on which line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(Path(frame.filename))]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else _shown(settings)
    if within := _place_in_libraries(frames):
        place += f" (in {within})"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return (
            f"the script needs {error.filename} at {place}, which is not here: give --cwd the "
            "directory that the command is run in, or put the file there"
        )
    if isinstance(error, OSError) and (absent := _ABSENT_MODEL.search(str(error))) is not None:
        return (
            f"the script needs {absent[1] or 'a model of the hub'} at {place}, which is not here: "
            "get its configuration and tokenizer, without weights, or give --cwd the directory "
            "that the command is run in"
        )
    cause = cause_of(error).rstrip(".") if isinstance(error, Exception) else type(error).__name__
    return (
        f"the script stopped at {place} before its first optimizer step: {cause}; run it once "
        "without fitune to see whether its arguments and files are right, and with FITUNE_DEBUG=1 "
        "for all that it printed"
    )


#: what transformers says of a model that is neither in a directory nor in the hub's cache
_ABSENT_MODEL = re.compile(r"Repo id must [^']*(?:'[^']*'[^']*)*: '([^']+)'|in the cached files")


def _place_in_libraries(frames: Sequence[traceback.FrameSummary]) -> str | None:
    """Return the line of a library that the script's own code called, without PyTorch's.

    The command of a package is no more than a call of that package.
    """
    for frame in reversed(frames):
        file = Path(frame.filename)
        if _is_own(file):
            return None
        if directories := LIBRARIES & set(file.parts):
            inside = file.parts[file.parts.index(directories.pop()) + 1 :]
            if inside[0] != "torch":
                return f"{'/'.join(inside)}:{frame.lineno}"
    return None


#: Python's own modules, and fitune's
_NOT_OWN = (Path(sysconfig.get_paths()["stdlib"]), Path(__file__).parent.parent)


def _is_own(file: Path) -> bool:
    """Return whether this is a file of the script's author."""
    is_installed = LIBRARIES & set(file.parts) or any(map(file.is_relative_to, _NOT_OWN))
    return not is_installed and not file.name.startswith("<")


@contextmanager
def _weights_unknown() -> Iterator[None]:
    """Forget the numbers that a model is initialised with, so that no pass is computed with them."""

    def forget(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if isinstance(parameter, nn.Parameter):
            forget_data(parameter)

    handle = register_module_parameter_registration_hook(forget)
    try:
        yield
    finally:
        handle.remove()


# ---- evaluation ----


@contextmanager
def _equal_passes_skipped(ends: StepEnds, note: Callable[[str], None]) -> Iterator[None]:
    """Skip passes of a model without gradients once a step has recorded two of the same shapes.

    An evaluation runs hundreds of them. Each one takes from the allocator what the one before has
    given back. A skipped pass returns empty tensors of the shapes that the others returned. Each
    step has its own two, since a reference model runs in all of them and may be their peak.
    """
    call = nn.Module.__call__
    counts: dict[object, int] = {}
    results: dict[object, object] = {}
    depth = 0

    def call_or_skip(self: nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal depth
        if depth or torch.is_grad_enabled():
            depth += 1
            try:
                return call(self, *args, **kwargs)
            finally:
                depth -= 1
        key = (ends.next_step, id(self), self.training, _shapes(args), _shapes(kwargs))
        if counts.get(key, 0) >= _EQUAL_PASSES:
            note("passes without gradients on equal shapes are recorded twice, others skipped")
            return tree_map_only(_Blank, _Blank.tensor, results[key])
        depth += 1
        try:
            result = call(self, *args, **kwargs)
        finally:
            depth -= 1
        counts[key] = counts.get(key, 0) + 1
        if counts[key] == _EQUAL_PASSES:
            results[key] = tree_map_only(torch.Tensor, _Blank, result)
        return result

    with patch.object(nn.Module, "__call__", call_or_skip):
        yield


class _Blank:
    """The shape, dtype and device of a tensor that a pass returned."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def tensor(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _shapes(tree: object) -> str:
    return repr(tree_map_only(torch.Tensor, lambda tensor: (tensor.shape, tensor.dtype), tree))
