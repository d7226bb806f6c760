"""Limit the time and memory that a chat template may take, since it is a program of unknown origin.

The sandbox of jinja keeps a template from files and from Python, but not from endless loops or
unlimited strings. Inside `limited`, a rendering that takes too long is interrupted, and its memory
is limited by the system's limit on address space (Linux). Powers and products of integers, which no
exception can interrupt, are limited by their size.
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

#: seconds of processor time for one conversation; a long one takes a hundredth of a second
MOST_SECONDS = 10.0
#: memory that one rendering may allocate
MOST_BYTES = GIB
#: further characters of the rendered text for each character of the conversation
MOST_GROWTH = 100
#: characters that any rendered text may have
MOST_CHARS = 1_000_000
#: size of the result of a product or power of integers
_MOST_BITS = 100_000
#: seconds between two checks of the processor time
_CHECK_SECONDS = 0.05
#: its first number is the size of this process's address space in pages
_PAGES = Path("/proc/self/statm")


class LimitError(Exception):
    """Raised when a template exceeds a limit; its text says which."""


class _TookTooLong(BaseException):
    """Raised in the rendering thread, wherever it is.

    It is not an Exception, so no handler in a template may catch it.
    """


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: object, right: object) -> object:
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
            )
            if bits > _MOST_BITS:
                raise LimitError(f"it computes a number of {bits:,} bits")
        return super().call_binop(context, operator, left, right)


class TemplateLimits:
    """The limits of the renderings inside a `limited` block.

    `with limits: ...` applies them to one rendering.
    """

    def __init__(self, address_space: "_AddressSpace | None") -> None:
        self._address_space = address_space
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._due: float | None = None
        self._fired = False

    def __enter__(self) -> None:
        if self._address_space is not None:
            self._address_space.limit()
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
                # The rendering ended by itself meanwhile, so the pending exception is withdrawn.
                _raise_in(self._thread, None)
        self.unlimit_memory()
        if kind is _TookTooLong:
            raise LimitError(f"it takes more than {MOST_SECONDS:g} seconds") from None
        if kind is not None and issubclass(kind, MemoryError):
            raise LimitError(f"it takes more than {format_bytes(MOST_BYTES)} of memory") from None

    def unlimit_memory(self) -> None:
        """Restore the limit on address space.

        The block also calls it at its end: Ctrl-C in the middle of `__enter__` or `__exit__` may
            have left the limit in place, and all later code without memory.
        """
        if self._address_space is not None:
            self._address_space.unlimit()

    def check_time(self) -> None:
        """Interrupt the rendering if it has used up its processor time."""
        with self._lock:
            if self._due is not None and not self._fired and time.process_time() > self._due:
                self._fired = True
                _raise_in(self._thread, _TookTooLong)


_active: ContextVar[TemplateLimits | None] = ContextVar(
    "limits of the block that is entered", default=None
)


@contextmanager
def limited() -> Iterator[TemplateLimits]:
    """Make transformers compile and render templates with these limits, in this thread.

    A block inside another one shares its limits, so many renderings share one watcher thread.
    """
    outer = _active.get()
    if outer is not None:
        yield outer
        return
    limits = TemplateLimits(_AddressSpace.of_process())
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_CHECK_SECONDS):
            limits.check_time()

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
        limits.unlimit_memory()
        stopped.set()
        watcher.join()


def check_size(text: str, num_chars: int) -> None:
    """Raise LimitError for a text that is out of proportion to its conversation of `num_chars`."""
    if len(text) > MOST_CHARS + MOST_GROWTH * num_chars:
        raise LimitError(f"it makes {len(text):,} characters of a conversation of {num_chars:,}")


@lru_cache(maxsize=8)
def _compiled(template: str) -> object:
    with patch.object(chat_template_utils, "ImmutableSandboxedEnvironment", _Sandbox):
        compile_template = cast(
            Callable[[str], Any], chat_template_utils._cached_compile_jinja_template
        )
        return compile_template(template)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in another thread, or withdraw one that is pending (None)."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
    )


class _AddressSpace:
    """The address space of this process, which can be limited to MOST_BYTES above its size."""

    def __init__(self, before: tuple[int, int], limited: tuple[int, int]) -> None:
        self._before, self._limited = before, limited

    @classmethod
    def of_process(cls) -> "_AddressSpace | None":
        """Return None if the system has no such limit, or a tighter one is already in force."""
        if sys.platform != "linux":
            return None
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = int(_PAGES.read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
        if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
            return None
        return cls((soft, hard), (wanted, hard))

    def limit(self) -> None:
        self._set(self._limited)

    def unlimit(self) -> None:
        self._set(self._before)

    def _set(self, limits: tuple[int, int]) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, limits)
