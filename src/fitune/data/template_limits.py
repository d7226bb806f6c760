"""Bounds on a chat template, which is a program that came with somebody's tokenizer.

jinja's sandbox keeps it from files and from Python, not from loops without end or strings without bound. Within
`limited` a rendering that takes too long is broken off, what it allocates is bounded by the system's limit on address
space (Linux), and powers and products of numbers, which no exception can break off, are bounded by their size.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from unittest.mock import patch

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from fitune.units import GIB, format_bytes

MOST_SECONDS = 10.0
"""Of the processor, for one conversation; a long one takes a hundredth of a second."""
MOST_BYTES = GIB
MOST_GROWTH = 100
"""Characters of the rendered text for each of the conversation, beside MOST_CHARS."""
MOST_CHARS = 1_000_000
_MOST_BITS = 100_000
_LOOK_SECONDS = 0.05
_PAGES = Path("/proc/self/statm")


class LimitError(Exception):
    """The template went beyond a bound; the text says which."""


class _TookTooLong(BaseException):
    """Raised in the thread that renders, wherever it is: no template's own handling may catch it."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
            )
            if bits > _MOST_BITS:
                raise LimitError(f"it computes a number of {bits:,} bits")
        return super().call_binop(context, operator, left, right)


class TemplateLimits:
    """Of the renderings in a `limited` block. `with limits: ...` bounds one of them."""

    def __init__(self, room: "_Room | None") -> None:
        self._room = room
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._due: float | None = None
        self._fired = False

    def __enter__(self) -> None:
        if self._room is not None:
            self._room.close()
        self._due = time.process_time() + MOST_SECONDS

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._due = None
            fired, self._fired = self._fired, False
            if fired and kind is not _TookTooLong:
                _raise_in(self._thread, None)  # it ended by itself meanwhile
        self.open_room()
        if kind is _TookTooLong:
            raise LimitError(f"it takes more than {MOST_SECONDS:g} seconds") from None
        if kind is not None and issubclass(kind, MemoryError):
            raise LimitError(f"it takes more than {format_bytes(MOST_BYTES)} of memory") from None

    def open_room(self) -> None:
        """Ctrl-C in the middle of `__enter__` or `__exit__` has left it closed, and all that follows without memory."""
        if self._room is not None:
            self._room.open()

    def look(self) -> None:
        with self._lock:
            if self._due is not None and not self._fired and time.process_time() > self._due:
                self._fired = True
                _raise_in(self._thread, _TookTooLong)


_active: ContextVar[TemplateLimits | None] = ContextVar(
    "limits of the block that is entered", default=None
)


@contextmanager
def limited() -> Iterator[TemplateLimits]:
    """Within this block transformers compiles templates with these bounds, in this thread. A block inside another one
    has its limits, so that many renderings share one watcher."""
    outer = _active.get()
    if outer is not None:
        yield outer
        return
    limits = TemplateLimits(_Room.of_process())
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_LOOK_SECONDS):
            limits.look()

    watcher = threading.Thread(target=watch, name="template limits", daemon=True)
    watcher.start()
    try:
        with patch.object(chat_template_utils, "_compile_jinja_template", _compiled):
            token = _active.set(limits)
            try:
                yield limits
            finally:
                _active.reset(token)
    finally:
        limits.open_room()
        stopped.set()
        watcher.join()


def check_size(text: str, num_chars: int) -> None:
    """Raises LimitError for a text that is out of proportion to the conversation of `num_chars` that it was made of."""
    if len(text) > MOST_CHARS + MOST_GROWTH * num_chars:
        raise LimitError(f"it makes {len(text):,} characters of a conversation of {num_chars:,}")


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    with patch.object(chat_template_utils, "ImmutableSandboxedEnvironment", _Sandbox):
        compile_template = cast(
            Callable[[str], Any], chat_template_utils._cached_compile_jinja_template
        )
        return compile_template(template)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
    )


class _Room:
    """The address space of this process, which can be closed MOST_BYTES above what it has now."""

    def __init__(self, before: tuple[int, int], closed: tuple[int, int]) -> None:
        self._before, self._closed = before, closed

    @classmethod
    def of_process(cls) -> "_Room | None":
        """None where the system has no such limit, or a tighter one is set already."""
        if sys.platform != "linux":
            return None
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = int(_PAGES.read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
        if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
            return None
        return cls((soft, hard), (wanted, hard))

    def close(self) -> None:
        self._set(self._closed)

    def open(self) -> None:
        self._set(self._before)

    def _set(self, limits: tuple[int, int]) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, limits)
