"""Explain errors of a user's model or loop that fails while it is recorded.

An error that would occur without a recording too keeps its own text, with the way out where it is
known. An error that occurs because there are shapes and no data says so, and what can be predicted
instead.
"""

import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._subclasses.fake_tensor import UnsupportedOperatorException

from fitune.boundary import cause_of
from fitune.errors import FituneError, UsageError

_OURS = {"fitune", "torch", "contextlib.py"}
_READS_DATA = re.compile(
    r"can't pickle|meta (tensor|storage|device)|no data|fake ?tensor|data pointer|data_ptr|"
    r"access storage",
    re.IGNORECASE,
)
#: module of PEFT -> the name of the tuner, and why it cannot be recorded
_NOT_PREDICTED = {
    "shira": ("SHiRA", "it trains sparse tensors"),
    "frod": ("FRoD", "it computes with sparse tensors"),
    "adamss": (
        "AdaMSS",
        "the shapes of its adapters follow from the values of the weights",
    ),
}


@contextmanager
def explained(doing: str, assumed: Callable[[], bool]) -> Iterator[None]:
    """Raise UsageError with an explanation for errors of the block whose cause is known here.

    Other errors are raised unchanged.

    assumed: whether the recording has answered for data that was not there.
    """
    try:
        yield
    except Exception as error:
        if (message := _tuner_not_predicted(error, doing)) is not None:
            raise UsageError(message) from error
        if isinstance(error, FituneError):
            raise
        if (message := _explain(error, doing, assumed=assumed())) is None:
            raise
        raise UsageError(message) from error


def _explain(error: Exception, doing: str, *, assumed: bool) -> str | None:
    cause, place = cause_of(error), _place(error)
    if isinstance(error, ImportError):
        return f"{doing} needs a package that cannot be imported here ({cause}): install it in this environment"
    if isinstance(error, StopIteration):
        return f"{doing} ran out of batches at {place}: give the loop one for each of num_steps, or ask for fewer steps"
    if any(
        re.search(r"torch/(distributed|nn/parallel)/", frame.filename) for frame in _frames(error)
    ):
        return (
            f"{doing} sets up several processes at {place} ({cause}), and a prediction is of one: "
            "leave out init_process_group and what wraps the model (DistributedDataParallel, FSDP)"
        )
    if isinstance(error, UnsupportedOperatorException):
        return (
            f"{doing} calls the operator {error}, which does not tell the shapes of what it "
            "returns: register them (torch.library.register_fake), or predict the loop with "
            "PyTorch's own operators in its place"
        )
    by_peft = _of_package(error, "peft")
    if by_peft and assumed:
        return (
            f"{doing} fails in PEFT at {place} ({cause}), which reads the weights, and a "
            "prediction has their shapes alone: this tuner is not predicted; LoRA with as many "
            "trainable parameters needs about as much"
        )
    if isinstance(error, pickle.PicklingError) or _READS_DATA.search(str(error)):
        return (
            f"{doing} reads the memory of a tensor at {place} ({cause}), and a prediction has "
            "shapes alone: leave that out of the loop that is predicted, or give a kernel of "
            "PyTorch's own in its place"
        )
    if by_peft and isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        return f"{doing} fails in PEFT at {place} ({cause}): mend the configuration of the adapters"
    return None


def _tuner_not_predicted(error: Exception, doing: str) -> str | None:
    """Return a message if the error comes from a tuner of PEFT that cannot be recorded."""
    for frame in _frames(error):
        path = Path(frame.filename)
        found = _NOT_PREDICTED.get(path.parent.name) if "peft" in path.parts else None
        # A wrong configuration is another fault, and keeps its own message.
        if found is not None and (path.name != "config.py" or isinstance(error, ImportError)):
            name, reason = found
            return (
                f"{doing} cannot go on at {_place(error)}: PEFT's {name} is not predicted, because "
                f"{reason}. Predict LoRA with as many trainable parameters in its place, for an "
                "estimate"
            )
    return None


def _frames(error: Exception) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _place(error: Exception) -> str:
    """Return the innermost line of code that is neither torch's nor fitune's."""
    own = [frame for frame in _frames(error) if not _OURS & set(Path(frame.filename).parts)]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"


def _of_package(error: Exception, name: str) -> bool:
    """Return whether the innermost code outside of Python and PyTorch is this package's."""
    for frame in reversed(_frames(error)):
        parts = Path(frame.filename).parts
        if "site-packages" in parts:
            package = parts[parts.index("site-packages") + 1]
            if package != "torch":
                return package == name
        elif "fitune" not in parts and not frame.filename.startswith("<"):
            return False
    return False
