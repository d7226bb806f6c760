"""Show the progress of a run on stderr: a bar on a terminal, lines elsewhere (nohup, log files)."""

import time
from collections import deque

from rich.cells import cell_len
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from fitune.cli.notebook import NotebookProgress, in_notebook
from fitune.cli.output import Screen
from fitune.language import say, translated
from fitune.run.directory import RunDirectory
from fitune.run.metrics import EvalMetrics, StepMetrics
from fitune.units import format_bytes, format_seconds

PLAIN_EVERY_SECONDS = 10.0
RATE_STEPS = 50
_BAR_COLUMNS, _SHARE_COLUMNS = 12, 4


class TrainingProgress:
    """A progress display on stderr.

    Speed and remaining time are computed from the last steps of this process, so that they are
    right after a resume.
    """

    def __init__(self, *, quiet: bool, screen: Screen | None = None) -> None:
        self._console = screen or Screen(stderr=True, quiet=quiet)
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RATE_STEPS)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=_BAR_COLUMNS),
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=_SHARE_COLUMNS)),
            TextColumn(
                "{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(say("starting"), total=None, text="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar: a message, a warning or an event."""
        self._bar.console.print(translated(text), soft_wrap=True)

    def begin(self, run: RunDirectory) -> None:
        """Print the directory of the run, once it exists."""
        self.note(f"run    {run.path}")

    def stage(self, name: str) -> None:
        """Show what happens before the first step, in the bar or as a line every ten seconds."""
        name = translated(name)
        self._bar.update(self._task, description=name, total=None, text="")
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= PLAIN_EVERY_SECONDS:
            self._last_line = now
            self.note(f"       {name}")

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        """Show a step. progress: the share of the run (0 to 1) that is done after it."""
        now = time.monotonic()
        self._recent.append((now, metrics.total_tokens, progress))
        parts = self._parts(metrics)
        text = " | ".join(parts)
        training = say("train")
        room = self._console.width - cell_len(training) - _BAR_COLUMNS - _SHARE_COLUMNS - 3
        while len(parts) > 1 and cell_len(" | ".join(parts)) > room:
            parts.pop()
        self._bar.update(
            self._task, description=training, total=1.0, completed=progress, text=" | ".join(parts)
        )
        plain = not self._console.is_terminal
        if plain and (progress >= 1 or now - self._last_line >= PLAIN_EVERY_SECONDS):
            self._last_line = now
            self.note(f"{progress:6.1%}  {text}")

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None:
        saved = " | best, saved" if best else ""
        if metrics.eval_kl is not None:
            margin = "n/a" if metrics.eval_margin is None else f"{metrics.eval_margin:.3f}"
            self.note(
                f"eval at step {metrics.step}: loss {metrics.eval_loss:.4f} | margin {margin} | "
                f"KL {metrics.eval_kl:.3f}{saved}"
            )
            return
        if metrics.eval_pair_accuracy is not None:
            self.note(
                f"eval at step {metrics.step}: loss {metrics.eval_loss:.4f} | margin "
                f"{metrics.eval_margin:.3f} | chosen preferred {metrics.eval_pair_accuracy:.1%}{saved}"
            )
            return
        self.note(
            f"eval at step {metrics.step}: loss {metrics.eval_loss:.4f} | perplexity "
            f"{metrics.eval_perplexity:.2f} | accuracy {metrics.eval_accuracy:.1%}{saved}"
        )

    def _parts(self, metrics: StepMetrics) -> list[str]:
        """Return the parts of a step's text, most important first: a narrow bar drops the last."""
        (start, first_tokens, first_progress), (end, last_tokens, last_progress) = (
            self._recent[0],
            self._recent[-1],
        )
        rate = left = None
        if end > start:
            rate = (last_tokens - first_tokens) / (end - start)
            speed = (last_progress - first_progress) / (end - start)
            left = (1 - last_progress) / speed if speed > 0 else None
        parts = [
            *([] if left is None else [f"{say('left')} {format_seconds(left)}"]),
            f"{say('step')} {metrics.step}",
            f"{say('loss')} {metrics.loss:.3f}",
        ]
        if rate is not None:
            parts.append(f"{rate:,.0f} {say('tok/s')}")
        peak = metrics.peak_reserved_bytes or metrics.device_used_bytes
        if peak is not None:
            parts.append(f"{say('peak')} {format_bytes(peak)}")
        return [*parts, f"lr {metrics.lr:.1e}"]


RunProgress = TrainingProgress | NotebookProgress


def open_progress(*, quiet: bool) -> RunProgress:
    """Return the progress display that suits a notebook, a terminal or a log file."""
    return NotebookProgress() if in_notebook() and not quiet else TrainingProgress(quiet=quiet)
