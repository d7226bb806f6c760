"""Let a script write its files into a scratch directory, where it also finds them again.

A predicted script must leave nothing behind: no checkpoint, no log, no cache. Every path that it
opens for writing, makes, moves or removes is taken to be below the scratch directory. A path that
it reads is looked for there first.
"""

import builtins
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from fitune.recorder.library_patches import when_imported

#: Where a process writes without leaving anything behind
_NO_FILES = ("/dev/", "/proc/")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class ScratchFiles:
    """Redirects the files that this process writes.

    directory: an empty directory, in which the whole path of each file is repeated.
    """

    def __init__(self, directory: Path) -> None:
        self._root = os.path.realpath(directory)
        self._stat = os.stat
        #: the paths that were to be written, in order
        self.written: dict[str, None] = {}

    @contextmanager
    def redirected(self) -> Iterator[None]:
        """Redirect all files of this block."""
        real_open, os_open = builtins.open, os.open

        def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> object:
            changes = any(letter in mode for letter in "wax+")
            return real_open(self._place(file, changes), mode, *arguments, **options)

        def open_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            return os_open(self._place(path, bool(flags & _WRITES)), flags, *arguments, **options)

        with ExitStack() as stack:
            for module in (builtins, io):
                stack.enter_context(patch.object(module, "open", open_file))
            stack.enter_context(patch.object(os, "open", open_descriptor))
            for name in ("stat", "lstat", "statvfs", "access", "readlink", "chdir"):
                stack.enter_context(patch.object(os, name, self._reading(getattr(os, name))))
            for name in ("mkdir", "utime", "chmod", "truncate", "mkfifo"):
                stack.enter_context(patch.object(os, name, self._making(getattr(os, name))))
            for owner, name in ((os, "remove"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
                stack.enter_context(patch.object(owner, name, self._removing(getattr(owner, name))))
            for name in ("rename", "replace", "link"):
                stack.enter_context(patch.object(os, name, self._moving(getattr(os, name))))
            symlink = os.symlink
            stack.enter_context(
                patch.object(
                    os, "symlink", lambda of, at, *_, **__: symlink(of, self._place(at, True))
                )
            )
            stack.enter_context(when_imported({"pyarrow": self._mapped}))
            stack.enter_context(patch.object(os, "listdir", self._listing(os.listdir)))
            stack.enter_context(patch.object(os, "scandir", self._scanning(os.scandir)))
            yield

    def refuse_others(self) -> None:
        """Let no code of this process write elsewhere, nor use the network, from now on.

        Python cannot remove such a hook again, so this is for processes that record one script.
        """

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("socket.connect", "socket.getaddrinfo"):
                raise ConnectionError("a script that is predicted has no network")
            if event != "open" or not isinstance(arguments[2], int):
                return
            path, _, flags = arguments
            if flags & _WRITES and isinstance(path, (str, bytes)) and self._is_outside(path):
                raise PermissionError(
                    f"a script that is predicted writes no files, and {os.fsdecode(path)} is one"
                )

        sys.addaudithook(hook)

    def _is_outside(self, path: Any) -> bool:
        absolute = os.path.abspath(os.fsdecode(path))
        return not absolute.startswith((self._root + os.sep, *_NO_FILES))

    def _place(self, path: Any, changes: bool) -> Any:
        """Return where a path is read, or where it is written if the call `changes` it."""
        if not isinstance(path, (str, bytes, os.PathLike)) or not self._is_outside(path):
            return path
        absolute = os.path.abspath(os.fsdecode(path))
        scratch = os.path.join(self._root, absolute.lstrip(os.sep))
        if changes:
            self.written.setdefault(absolute)
            os.makedirs(os.path.dirname(scratch), exist_ok=True)
            # a file that is appended to, or changed in place, keeps what it had
            if os.path.isfile(absolute) and not os.path.exists(scratch):
                shutil.copyfile(absolute, scratch)
            return scratch
        try:
            self._stat(scratch)
        except OSError:
            return path
        return scratch

    def _reading(self, call: Callable[..., Any]) -> Callable[..., object]:
        return lambda path=".", *arguments, **options: call(
            self._place(path, False), *arguments, **options
        )

    def _mapped(self, pyarrow: ModuleType) -> AbstractContextManager[object]:
        """Let Arrow, which opens files without Python, find the scratch directory."""
        return patch.object(pyarrow, "memory_map", self._reading(pyarrow.memory_map))

    def _making(self, call: Callable[..., Any]) -> Callable[..., object]:
        return lambda path, *arguments, **options: call(
            self._place(path, True), *arguments, **options
        )

    def _removing(self, call: Callable[..., Any]) -> Callable[..., object]:
        def remove(path: Any, *arguments: object, **options: object) -> None:
            place = self._place(path, False)
            if place is path and self._is_file_outside(path):
                return  # a file of the user's stays where it is
            call(place, *arguments, **options)

        return remove

    def _moving(self, call: Callable[..., Any]) -> Callable[..., object]:
        def move(source: Any, target: Any, *arguments: object, **options: object) -> None:
            place = self._place(source, False)
            if place is source and self._is_file_outside(source):
                shutil.copyfile(source, self._place(target, True))
            else:
                call(place, self._place(target, True), *arguments, **options)

        return move

    def _listing(self, call: Callable[..., list[Any]]) -> Callable[..., list[object]]:
        def listdir(path: Any = ".") -> list[object]:
            place = self._place(path, False)
            if place is path:
                return call(path)
            try:
                before = call(path)
            except OSError:
                before = []
            return list(dict.fromkeys([*before, *call(place)]))

        return listdir

    def _scanning(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def scandir(path: Any = ".") -> object:
            try:
                return call(path)
            except FileNotFoundError:
                return call(self._place(path, False))

        return scandir

    def _is_file_outside(self, path: Any) -> bool:
        return (
            isinstance(path, (str, bytes, os.PathLike))
            and self._is_outside(path)
            and os.path.lexists(path)
        )
