"""Patch libraries that the recorder does not import itself, such as transformers.

A loop or script may have imported them already, may import them while it is recorded, or may not
use them at all.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

#: The directories in which libraries are installed; modules elsewhere are the user's own
LIBRARIES = {"site-packages", "dist-packages"}
#: Patches a module for as long as the context lasts
Patch = Callable[[Any], AbstractContextManager[object]]


def is_library_import() -> bool:
    """Return whether a library is being imported by the code that is recorded."""
    frame: FrameType | None = sys._getframe(2)
    # code of fitune calls what is recorded
    while frame is not None and not _is_of_fitune(frame):
        code = frame.f_code
        is_installed = LIBRARIES & set(Path(code.co_filename).parts)
        # a package may run a file of its own as the script, as the recipes of torchtune are
        is_script = frame.f_globals.get("__name__") == "__main__"
        if code.co_name == "<module>" and is_installed and not is_script:
            return True
        frame = frame.f_back
    return False


def _is_of_fitune(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("fitune.")


@contextmanager
def when_imported(patches: Mapping[str, Patch]) -> Iterator[None]:
    """Patch each of these modules in this block: at once, or right after the block imports it."""
    with ExitStack() as stack:
        waiting = {}
        for name, patch in patches.items():
            if (module := sys.modules.get(name)) is None:
                waiting[name] = patch
            else:
                stack.enter_context(patch(module))
        finder = _Finder(waiting, stack)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        yield


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that wait to be patched, with the finders that come after this one."""

    def __init__(self, waiting: dict[str, Patch], stack: ExitStack) -> None:
        self._waiting, self._stack = waiting, stack

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (patch := self._waiting.pop(fullname, None)) is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(
            (found for each in others if (found := each.find_spec(fullname, path, target))), None
        )
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, patch, self._stack)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, and then patches it."""

    def __init__(self, loader: Any, patch: Patch, stack: ExitStack) -> None:
        self._loader, self._patch, self._stack = loader, patch, stack

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # code that asks for the loader later gets the real one, with all its methods
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._stack.enter_context(self._patch(module))
