"""Sends a run to experiment trackers, through accelerate's adapters.

A tracker gets the configuration, every step, evaluation and event, and at the end the run's small
files. All trackers stay on this machine and none asks a question: wandb and swanlab write for a
later `sync`, unless both their key and their mode are in the environment (WANDB_API_KEY and
WANDB_MODE, SWANLAB_API_KEY and SWANLAB_MODE).
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fitune.config import RunConfig
from fitune.errors import ConfigError, FituneError
from fitune.run.directory import RunDirectory
from fitune.run.metrics import EvalMetrics, StepMetrics

PROJECT = "fitune"
#: the configuration by key, such as optim.lr
Settings = dict[str, bool | int | float | str]


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError if a tracker is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [f"run.trackers: {name} is not installed: pip install {name}" for name in missing]
        )


@contextmanager
def open_trackers(
    config: RunConfig, run: RunDirectory, *, notify: Callable[[str], None]
) -> Iterator[tuple["Tracked", ...]]:
    """Start the trackers of `run.trackers`, and yield them as watchers.

    notify: is called when one of them fails, which does not end the run.

    Raises FituneError if one cannot start.
    """
    settings = _flat(config.model_dump(mode="json"))
    with ExitStack() as opened:
        yield tuple(
            opened.enter_context(
                _started(name, run, output=config.run.output, settings=settings, notify=notify)
            )
            for name in config.run.trackers
        )


class Tracker:
    """What differs between trackers; everything else is the same through accelerate's adapters."""

    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        """Return the arguments for accelerate's adapter.

        output: where all runs are.
        """
        raise NotImplementedError

    def event(self, text: str) -> dict[str, Any] | None:
        """Return what is logged for an event; None if the tracker takes only numbers."""
        return {"event": text}

    def save(self, tracker: Any, path: Path, run: RunDirectory) -> None:
        """Give a file of the run to the tracker, if it stores files."""

    def finish(self, tracker: Any) -> None:
        tracker.finish()


class TensorBoard(Tracker):
    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        # so that `tensorboard --logdir runs` shows every run
        return {"run_name": "tensorboard", "logging_dir": run.trackers}


class Trackio(Tracker):
    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        return {"run_name": PROJECT, "name": run.name, "auto_log_gpu": False, "auto_log_cpu": False}

    def finish(self, tracker: Any) -> None:
        import trackio

        # after accelerate's `finish`, trackio would finish and print a second time at exit
        trackio.finish()


class Wandb(Tracker):
    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        run.trackers.mkdir(exist_ok=True)
        return {
            "run_name": PROJECT,
            "name": run.name,
            "dir": str(run.trackers),
            "mode": _mode("WANDB"),
        }

    def save(self, tracker: Any, path: Path, run: RunDirectory) -> None:
        tracker.tracker.save(str(path), base_path=str(run.path), policy="now")


class SwanLab(Tracker):
    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        place = run.trackers / "swanlab"
        place.mkdir(parents=True, exist_ok=True)
        return {
            "run_name": PROJECT,
            "name": run.name,
            "log_dir": str(place),
            "mode": _mode("SWANLAB"),
        }

    def event(self, text: str) -> dict[str, Any]:
        import swanlab

        return {"event": swanlab.Text(text)}


class MLflow(Tracker):
    def options(self, run: RunDirectory, output: Path) -> dict[str, Any]:
        import mlflow

        output = output.absolute()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{output / 'mlflow.db'}")
        return {
            "experiment_name": PROJECT,
            "run_name": run.name,
            "logging_dir": (output / "mlartifacts").as_uri(),
        }

    def event(self, text: str) -> None:
        """Log nothing: MLflow takes only numbers, and gets events.jsonl at the end."""

    def save(self, tracker: Any, path: Path, run: RunDirectory) -> None:
        tracker.log_artifact(str(path))


TRACKERS: dict[str, Tracker] = {
    "tensorboard": TensorBoard(),
    "trackio": Trackio(),
    "wandb": Wandb(),
    "swanlab": SwanLab(),
    "mlflow": MLflow(),
}


class Tracked:
    """A watcher that passes everything on to one tracker.

    tracker: accelerate's adapter.
    notify: is called when the tracker fails for the first time.
    """

    def __init__(
        self, name: str, tracker: Any, run: RunDirectory, notify: Callable[[str], None]
    ) -> None:
        self._name, self._kind = name, TRACKERS[name]
        self._tracker, self._run, self._notify = tracker, run, notify
        self._step = 0
        self._works = True

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        self._step = metrics.step
        self._log({f"train/{name}": value for name, value in asdict(metrics).items()})

    def evaluation(self, metrics: EvalMetrics, *, best: bool) -> None:
        self._log(
            {f"eval/{name.removeprefix('eval_')}": value for name, value in asdict(metrics).items()}
        )

    def note(self, text: str) -> None:
        self._log(self._kind.event(text))

    def finish(self) -> None:
        run = self._run
        with self._guarded():
            for path in (run.config, run.env, run.plan, run.summary, run.metrics, run.events):
                if path.exists():
                    self._kind.save(self._tracker, path, run)
        with self._guarded():
            self._kind.finish(self._tracker)

    def _log(self, values: dict[str, Any] | None) -> None:
        if values is None:
            return
        with self._guarded():
            known = {name: value for name, value in values.items() if value is not None}
            self._tracker.log(known, step=self._step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Redirect what the tracker prints to stderr, and report only the first of its failures."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # a full disk, the network, a bug: nothing that may end the run
            if self._works:
                self._notify(f"warning: {self._name} failed and may be incomplete: {error}")
            self._works = False


@contextmanager
def _started(
    name: str,
    run: RunDirectory,
    *,
    output: Path,
    settings: Settings,
    notify: Callable[[str], None],
) -> Iterator["Tracked"]:
    tracker = Tracked(name, _start(name, run, output, settings), run, notify)
    try:
        yield tracker
    finally:
        tracker.finish()


def _start(name: str, run: RunDirectory, output: Path, settings: Settings) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    with redirect_stdout(sys.stderr):
        try:
            PartialState()  # accelerate's adapters do not work without it
            tracker = LOGGER_TYPE_TO_CLASS[name](**TRACKERS[name].options(run, output))
            tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:
            raise FituneError(f"{name} cannot start: {error}; drop it from run.trackers") from error
    return tracker


def _mode(prefix: str) -> str:
    return (
        os.environ.get(f"{prefix}_MODE", "offline")
        if f"{prefix}_API_KEY" in os.environ
        else "offline"
    )


def _flat(content: dict[str, Any], prefix: str = "") -> Settings:
    """Flatten nested keys: {'optim': {'lr': 1e-4}} -> {'optim.lr': 1e-4}.

    Unset values are left out, and lists and other nested values become text.
    """
    flat: Settings = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, bool | int | float | str) else str(value)
            )
    return flat
