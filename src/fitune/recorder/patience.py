"""Limit how long the recordings of one prediction or plan may take, and report their progress.

A model that computes the tokens of a sequence one by one, in Python (RWKV, Mamba and linear
attention without their kernels), runs a thousand times as many operators as one that does not, and
its recording would not end in any useful time.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fitune.errors import TooLongError, UsageError
from fitune.language import translated

#: Environment variable that replaces `MOST_SECONDS`
VARIABLE = "FITUNE_RECORD_SECONDS"
#: Nearly three times the time of the slowest architecture whose recording ends, a Qwen3.5 of
#: default size on one slow core
MOST_SECONDS = 180.0
REPORT_EVERY_SECONDS = 30.0
_EVERY_OPERATORS = 1024
_OURS = ("torch", "fitune")
#: (module, function) of the outermost frame that belongs to a recording
_RECORDS = ("fitune.recorder.record", "record")

log = logging.getLogger("fitune")


class Patience:
    """Counts the operators of the recordings that share it, and checks their time.

    The time is the processor time of this thread within all `recording` blocks together.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin to count anew, for another prediction or plan."""
        self._spent = 0.0
        self._num_operators = 0
        self._places: Counter[str] = Counter()
        self._reset()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Measure the time of this block.

        Raises TooLongError if earlier blocks have used the time up.
        """
        self._reset()
        self._check(self._started)
        try:
            yield
        finally:
            self._spent += time.thread_time() - self._started

    def _reset(self) -> None:
        self._until_check = _EVERY_OPERATORS
        self._limit = _limit()
        self._started = self._reported = time.thread_time()

    def operator(self) -> None:
        """Count one operator. Raises TooLongError if the recordings take too long."""
        self._until_check -= 1
        if self._until_check:
            return
        self._num_operators += _EVERY_OPERATORS
        self._until_check = _EVERY_OPERATORS
        now = time.thread_time()
        if (place := _place(sys._getframe(1))) is not None:
            self._places[place] += 1
        self._check(now)
        if now - self._reported > REPORT_EVERY_SECONDS:
            self._reported = now
            log.warning(
                "%s",
                translated(
                    f"still recording the step, {now - self._started:.0f} s so far{self._where()}"
                ),
            )

    def _check(self, now: float) -> None:
        if self._spent + now - self._started > self._limit:
            raise TooLongError(
                f"recording the step took more than {self._limit:.0f} s of processor "
                f"time{self._where()}: a model that goes through positions one by one is recorded "
                "with each of them. Install the kernels that it has for that (mamba-ssm, "
                "causal-conv1d, flash-linear-attention), predict it with a smaller "
                "data.max_length, to which its memory is nearly proportional, or wait longer with "
                f"{VARIABLE}"
            )

    def _where(self) -> str:
        if not self._num_operators:
            return ""
        place = self._places.most_common(1)[0][0] if self._places else "the loop"
        return f" ({self._num_operators:,} operators, most of them in {place})"


def _limit() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else MOST_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{VARIABLE} is {text!r}: give a number of seconds above 0, or unset it")
    return seconds


def _place(frame: FrameType | None) -> str | None:
    """Return the innermost function outside of torch and fitune that calls the operator.

    Returns None in a backward, which calls no such function: frames further out are those that
    called for the recording.
    """
    while frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) != _RECORDS:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _OURS:
            return f"{frame.f_code.co_name} of {Path(frame.f_code.co_filename).name}"
        frame = frame.f_back
    return None
