"""Let the processes that a script starts by multiprocessing prepare its data.

A process that is started anew would write beside the user's files, and find no card. So all begin
as copies of this one, whose files are redirected, and compute on real tensors.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from unittest.mock import patch

import torch

from fitune.recorder.library_patches import when_imported
from fitune.recorder.weight_files import on_host

#: Classes of multiprocessing.context that start a new Python
_STARTING_ANEW = ("SpawnProcess", "ForkServerProcess")


class Workers:
    """Counts the processes that the script of this process starts by multiprocessing."""

    def __init__(self) -> None:
        self.num_started = 0
        self._of_worker = ExitStack()

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Fork all processes of this block.

        Python cannot forget what it does after a fork, so this is for processes that record one
        script.
        """
        if not hasattr(os, "fork"):
            yield
            return
        os.register_at_fork(after_in_child=self._compute_really)
        # the package multiprocess, by which datasets.map starts its processes, is a copy
        with when_imported(
            dict.fromkeys(("multiprocessing.context", "multiprocess.context"), self._fork)
        ):
            yield

    def _compute_really(self) -> None:
        torch.set_num_threads(1)
        self._of_worker.enter_context(on_host())

    def _fork(self, context: ModuleType) -> AbstractContextManager[object]:
        fork = context.ForkProcess._Popen

        def start(process: object) -> object:
            self.num_started += 1
            return fork(process)

        stack = ExitStack()
        for name in ("ForkProcess", *_STARTING_ANEW):
            stack.enter_context(patch.object(getattr(context, name), "_Popen", staticmethod(start)))
        return stack
