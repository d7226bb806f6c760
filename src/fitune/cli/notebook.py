"""Show a run in a notebook as one block that is updated, instead of a growing log."""

import sys
import time
from typing import Any

from fitune.cli.output import MAX_WIDTH, Screen, html_block
from fitune.cli.watch_screen import watch_screen
from fitune.language import translated
from fitune.run.directory import RunDirectory
from fitune.run.follow import RunFollower
from fitune.run.metrics import EvalMetrics, StepMetrics

REFRESH_SECONDS = 2.0


def in_notebook() -> bool:
    """Return whether this process is a notebook kernel: Jupyter, Colab, Kaggle or VS Code."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookProgress:
    """A progress display that shows messages until a run begins, then the `fitune watch` screen."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stage: str | None = None
        self._follower: RunFollower | None = None
        self._handle: Any = None
        self._shown = 0.0

    def __enter__(self) -> "NotebookProgress":
        return self

    def __exit__(self, *unused: object) -> None:
        self._show()

    def note(self, text: str) -> None:
        """Show a message. After the run has begun, the screen shows it as an event of the run."""
        if self._follower is None:
            self._lines.append(translated(text))
        self._refresh()

    def stage(self, name: str) -> None:
        self._stage = translated(name)
        self._refresh()

    def begin(self, run: RunDirectory) -> None:
        self.note(f"run    {run.path}")
        self._follower = RunFollower(run)

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        self._refresh()

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None:
        self._refresh()

    def _refresh(self) -> None:
        if time.monotonic() - self._shown >= REFRESH_SECONDS:
            self._show()

    def _show(self) -> None:
        from IPython.display import HTML, display

        self._shown = time.monotonic()
        block = HTML(html_block(self._print))
        if self._handle is None:
            self._handle = display(block, display_id=True)
        else:
            self._handle.update(block)

    def _print(self, screen: Screen) -> None:
        for line in self._lines:
            screen.print(line)
        if self._follower is None:
            screen.print(f"       {self._stage or ''}".rstrip())
        else:
            screen.print(
                watch_screen(self._follower.read(), width=MAX_WIDTH, height=None, now=time.time())
            )
