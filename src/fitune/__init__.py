"""Fine-tunes a language model within the memory that is there.

    fitune.predict(config, gpu="RTX 4090")   predicts the memory of a run (planning/predict.py)
    fitune.plan(config, gpu="RTX 4090")      finds the settings that fit, and chooses one
                                             (planning/search.py)
    fitune.train(config)                     trains
    fitune.compare(runs)                     compares runs at equal tokens (report/compare.py)
    fitune.predict_loop(build, loop)         predicts the memory of a loop that is not fitune's
    fitune.predict_trainer(trainer)          predicts the memory of a Trainer of transformers or
                                             TRL, before it trains
    fitune.predict_script(command, gpu=...)  predicts the memory of a training script, unchanged
                                             (planning/script.py)
    fitune.SafeStep(model, optimizer)        gives such a loop a step that survives running out of
                                             memory

A config is a mapping, the path of a YAML file or a RunConfig. Neither torch nor transformers is
imported before one of these is called.
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
__all__ = [
    "SafeStep",
    "__version__",
    "compare",
    "plan",
    "predict",
    "predict_loop",
    "predict_script",
    "predict_trainer",
    "train",
]


def __dir__() -> list[str]:
    """Return the public names, without the packages."""
    return __all__


@bounded("fitune.train")
def train(
    config: "RunConfig | Mapping[str, Any] | Path | str",
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> "Summary":
    """Train as `config` says, like the command `fitune train`, and return the summary of the run.

    The files of the run are in the directory `run.output`/`run.name`.

    config: a mapping, the path of a YAML file, or a RunConfig.
    overwrite: whether an earlier run of that name is replaced.
    quiet: whether no progress is shown on stderr.

    Raises a FituneError, see fitune/errors.py.
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
    """Return what each setting of `config` needs and which one was chosen, as `fitune plan` shows.

    config: a mapping, the path of a YAML file, or a RunConfig.
    gpu: a card of the catalogue, or 'cpu'; None for this machine's card.

    If no setting fits, the `chosen` of the returned plan is None. Raises UsageError for an unknown
    card or a wrong configuration.
    """
    with collections_paused():
        from fitune.config import RunConfig, read_config
        from fitune.planning.search import choose_plan

    return choose_plan(
        config if isinstance(config, RunConfig) else read_config(config).config, gpu=gpu
    )


#: public names that are imported when they are first used, and their modules
_ELSEWHERE = {
    "predict": "fitune.planning.predict",
    "compare": "fitune.report.compare",
    "predict_script": "fitune.planning.script",
    "predict_trainer": "fitune.integrations.transformers",
    "SafeStep": "fitune.integrations.own_loop",
}


def _renderer(module: str, function: str) -> Callable[[object], str]:
    """Return a renderer that imports its module when it is first needed."""
    return lambda shown: str(getattr(importlib.import_module(module), function)(shown))


RENDERERS["Plan"] = _renderer("fitune.cli.plan_table", "html_plan")
RENDERERS["Prediction"] = _renderer("fitune.cli.plan_trainer", "html_prediction")
RENDERERS["Comparison"] = _renderer("fitune.report.tables", "html_table")

if TYPE_CHECKING:
    from fitune.integrations.own_loop import SafeStep as SafeStep
    from fitune.integrations.transformers import predict_trainer as predict_trainer
    from fitune.planning.predict import predict as predict
    from fitune.planning.script import predict_script as predict_script
    from fitune.report.compare import compare as compare

else:

    def __getattr__(name: str) -> object:
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
    """Predict the memory of any training loop, without the card and without weights.

    Both functions are really called, with tensors that have no data. Where the loop's behaviour
    depends on data, assumptions are made, which are listed in `Prediction.assumptions`.

    build: returns the model with adapters, gradient checkpointing and dtypes as it is trained.
    loop: loop(model, device) sets up what training needs and returns a function that does one step.
    gpu: a card of the catalogue, or "cpu"; None for this machine's card.
    num_steps: the number of steps to record. All figures are those of the last one; `step_peaks`
        has the peak of each.
    attention: the kernel of `scaled_dot_product_attention`; "auto" follows PyTorch's choice.
    routing: whether the tokens of a mixture of experts are spread evenly over the experts, or all
        go to the same ones. If the memory depends on it, both are recorded, and `device_interval`
        spans both.

    Raises UsageError for an unknown card.
    """
    with collections_paused():
        from fitune.allocator.prediction import PredictSettings, either_routing, predict_trace
        from fitune.machine.devices import cpu_device, find_device, this_machine
        from fitune.model.quantise import replace_bitsandbytes_layers
        from fitune.recorder.cuda_target import CudaTarget
        from fitune.recorder.record import RecordSettings, record_loop

    device = find_device(gpu) if gpu is not None else next(iter(this_machine()), cpu_device())
    target = None
    if device.kind == "cuda":
        target = CudaTarget(
            device.compute_capability or (8, 0),
            attention,
            device.name,
            device.total_bytes,
            device.multiprocessors,
        )

    def on_card(model: "torch.nn.Module", stand_in: "torch.device") -> Callable[[], Any]:
        return loop(model, stand_in if target is None else type(stand_in)("cuda"))

    def predict_routed(routing: Literal["balanced", "worst"]) -> "Prediction":
        settings = RecordSettings(
            target=target,
            num_steps=num_steps,
            routing=routing,
            adapt=replace_bitsandbytes_layers,
        )
        return predict_trace(record_loop(build, on_card, settings), PredictSettings(device=device))

    return either_routing(predict_routed, routing)
