"""fitune: fine-tune a language model inside the memory you have.

    fitune.predict(config, gpu="RTX 4090")     what a run will need            (planning/predict.py)
    fitune.plan(config, gpu="RTX 4090")        what fits, and what was chosen  (planning/search.py)
    fitune.train(config)                       the whole run
    fitune.compare(runs)                       runs side by side               (report/compare.py)
    fitune.predict_loop(build, loop)           the same prediction for a loop that is not ours
    fitune.predict_trainer(trainer)            the same for a Trainer of transformers or TRL, before it trains
    fitune.SafeStep(model, optimizer)          a step of such a loop that running out of memory does not end

A config is a mapping, the path of a YAML file or a RunConfig. Nothing heavy is imported before one of these is called.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fitune.boundary import bounded
from fitune.display import RENDERERS
from fitune.importing import collections_paused

if TYPE_CHECKING:
    import torch

    from fitune.allocator.prediction import Prediction
    from fitune.config import RunConfig
    from fitune.planning.plan import Plan
    from fitune.run.metrics import Summary

__version__ = "0.1.0"
__all__ = ["SafeStep", "__version__", "compare", "plan", "predict", "predict_loop", "predict_trainer", "train"]


def __dir__() -> list[str]:
    """What there is to call; the packages of the house are found by their own names."""
    return __all__


@bounded("fitune.train")
def train(
    config: "RunConfig | Mapping[str, Any] | Path | str", *, overwrite: bool = False, quiet: bool = False
) -> "Summary":
    """The whole run of `config` (a mapping, a file or a RunConfig), as `fitune train` does it; its files are in the
    directory that `run.output` and `run.name` say. Progress is shown on stderr unless `quiet`.

    Raises a FituneError as listed in fitune/errors.py.
    """
    from fitune.cli.progress import open_progress
    from fitune.config import RunConfig, read_config
    from fitune.distributed.processes import joined
    from fitune.training.session import NewRun, run_session

    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json", exclude_defaults=True)
    resolved = read_config(config)
    with joined() as ranks, open_progress(quiet=quiet or not ranks.leads) as progress:
        return run_session(NewRun(resolved=resolved, overwrite=overwrite), progress, ranks=ranks)[1]


@bounded("fitune.plan")
def plan(config: "RunConfig | Mapping[str, Any] | Path | str", *, gpu: str | None = None) -> "Plan":
    """What each setting of `config` would need and which one was chosen, as `fitune plan` shows it. gpu: a card of the
    catalogue or 'cpu', this machine's card where left out. `chosen` is None where nothing fits. Raises a UsageError."""
    with collections_paused():
        from fitune.config import RunConfig, read_config
        from fitune.planning.search import choose_plan

    return choose_plan(config if isinstance(config, RunConfig) else read_config(config).config, gpu=gpu)


_ELSEWHERE = {
    "predict": "fitune.planning.predict",
    "compare": "fitune.report.compare",
    "predict_trainer": "fitune.integrations.transformers",
    "SafeStep": "fitune.integrations.own_loop",
}


def _drawn_by(module: str, function: str) -> Callable[[Any], str]:
    """Return a renderer that imports its module when it is first needed."""
    return lambda shown: str(getattr(importlib.import_module(module), function)(shown))


RENDERERS["Plan"] = _drawn_by("fitune.cli.plan_table", "html_plan")
RENDERERS["Prediction"] = _drawn_by("fitune.cli.plan_trainer", "html_prediction")
RENDERERS["Comparison"] = _drawn_by("fitune.report.tables", "html_table")

if TYPE_CHECKING:
    from fitune.integrations.own_loop import SafeStep as SafeStep
    from fitune.integrations.transformers import predict_trainer as predict_trainer
    from fitune.planning.predict import predict as predict
    from fitune.report.compare import compare as compare

else:

    def __getattr__(name: str) -> Any:
        if name in _ELSEWHERE:
            with collections_paused():
                return getattr(importlib.import_module(_ELSEWHERE[name]), name)
        raise AttributeError(f"module 'fitune' has no attribute '{name}'")


@bounded("fitune.predict_loop")
def predict_loop(
    build: "Callable[[], torch.nn.Module]",
    loop: "Callable[[torch.nn.Module, torch.device], Callable[[], Any]]",
    *,
    gpu: str | None = None,
    num_steps: int = 3,
    attention: Literal["auto", "flash", "efficient", "math", "eager"] = "auto",
    routing: Literal["balanced", "worst"] = "balanced",
) -> "Prediction":
    """Predicts the memory of any training loop, without the card and without weights.

    build() returns the model (with adapters, recompute, dtype as it is trained). loop(model, device) sets up what it
    needs and returns a function that does one step. Both run for real, on tensors without data; what depends on data is
    answered by stated assumptions (`Prediction.assumptions`). gpu: a card's name, "cpu", or None for this machine's
    card. attention: "auto" follows PyTorch's choice of kernel for `scaled_dot_product_attention`. routing: the tokens
    of a mixture of experts are spread evenly, or all go to the same experts; where that matters the other case is
    recorded too, and `device_interval` spans both.

    All figures are of the last of num_steps steps; `step_peaks` has the peaks of each. Raises UsageError for an unknown
    card.
    """
    with collections_paused():
        from fitune.allocator.prediction import PredictSettings, either_routing, predict_trace
        from fitune.machine.devices import cpu_device, find_device, this_machine
        from fitune.trace.cuda_target import CudaTarget
        from fitune.trace.record import RecordSettings, record_loop

    device = find_device(gpu) if gpu is not None else next(iter(this_machine()), cpu_device())
    target = None
    if device.kind == "cuda":
        target = CudaTarget(
            device.compute_capability or (8, 0), attention, device.name, device.total_bytes, device.multiprocessors
        )

    def on_card(model: "torch.nn.Module", stand_in: "torch.device") -> Callable[[], Any]:
        return loop(model, stand_in if target is None else type(stand_in)("cuda"))

    def predict_routed(routing: Literal["balanced", "worst"]) -> "Prediction":
        settings = RecordSettings(target=target, num_steps=num_steps, routing=routing)
        return predict_trace(record_loop(build, on_card, settings), PredictSettings(device=device))

    return either_routing(predict_routed, routing)
