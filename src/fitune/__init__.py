"""fitune: fine-tune a language model inside the memory you have.

summary = fitune.train({"model": {"source": "minimind2", ...}, "data": {"train": "sft.jsonl"}})
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitune.config import RunConfig
    from fitune.run.metrics import Summary

__version__ = "0.1.0"


def _train(
    config: "RunConfig | Mapping[str, Any] | Path | str", *, overwrite: bool = False, quiet: bool = False
) -> "Summary":
    """The whole run of `config` (a mapping, a file or a RunConfig), as `fitune train` does it; its files are in the
    directory that `run.output` and `run.name` say. Progress is shown on stderr unless `quiet`.

    Raises a FituneError as listed in fitune/errors.py.
    """
    from fitune.cli.progress import TrainingProgress
    from fitune.cli.train import run_training
    from fitune.config import RunConfig, read_config

    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json", exclude_defaults=True)
    resolved = read_config(config)
    with TrainingProgress(quiet=quiet) as progress:
        return run_training(resolved, progress, overwrite=overwrite)[1]


_VERBS = {"train": _train}

if TYPE_CHECKING:
    train = _train
else:

    def __getattr__(name: str) -> Any:
        if name in _VERBS:
            return importlib.import_module(f"fitune.{name}")
        raise AttributeError(f"module 'fitune' has no attribute '{name}'")


class CallableRoom(ModuleType):
    """A package of this house that is a verb too: Python has one name for `fitune.train(config)` and for the home of
    `fitune.train.loop`, so the package can be called. Nothing heavy is imported before that."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _VERBS[self.__name__.rpartition(".")[2]](*arguments, **options)
