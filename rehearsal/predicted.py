"""What fitune predicts for a case: the prediction, and the trace that it was made from. Needs no card."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import fitune
from fitune.allocator import prediction as prediction_module
from fitune.allocator.prediction import Prediction, PredictSettings
from fitune.config import RunConfig, read_config
from fitune.machine.devices import find_device, this_machine
from fitune.planning.predict import cuda_target, predict_run
from fitune.recorder.events import MemoryTrace
from fitune.trace.own_step import Pass, record_step
from rehearsal import loops
from rehearsal.cases import LoopCase, StepCase
from rehearsal.models import source

NUM_STEPS = 3
"""Of a loop: the optimizer's state is born in the first."""
_MOST = {"train": None, "eval": 1, "reference": 2}
"""The micro-batches of a pass that are recorded; None for those of the case."""
Routing = Literal["balanced", "worst"]
Predicted = tuple[Prediction, MemoryTrace]


def config_of(case: StepCase, directory: Path, *, routing: str = "balanced") -> RunConfig:
    tree = {
        "model": {"source": source(case.model, directory), "init": "random"},
        "data": {
            "train": "rows.jsonl",
            "max_length": max(length for length, _ in case.rows),
            "eval_fraction": 0.0,
        },
        "batch": {"micro": len(case.rows) // case.accumulation, "accumulation": case.accumulation},
        "memory": {"routing": routing},
    }
    return read_config(tree, list(case.options)).config


def passes_of(case: StepCase) -> list[Pass]:
    return [
        Pass(kind, case.rows, most_micro_batches=_MOST[kind] or case.accumulation)
        for kind in case.kinds
    ]


def predicted_step(case: StepCase, directory: Path, *, routing: Routing = "balanced") -> Predicted:
    """On this machine's card."""
    device = this_machine()[0]
    config = config_of(case, directory, routing=routing)
    trace = predict_run(config, device, passes=passes_of(case)).recorded.trace
    settings = PredictSettings(device=device, allocator=config.memory.allocator)
    return prediction_module.predict_trace(trace, settings), trace


def predicted_loop(
    case: LoopCase,
    *,
    gpu: str | None = None,
    num_steps: int = NUM_STEPS,
    routing: Routing = "balanced",
) -> Predicted:
    """gpu: as for `fitune.predict_loop`."""
    with traces_kept() as traces:
        prediction = fitune.predict_loop(
            lambda: loops.build(case),
            lambda model, device: loops.loop(case, model, device),
            gpu=gpu,
            num_steps=num_steps,
            routing=routing,
        )
    return prediction, traces[0]


def recorded_case(
    case: StepCase | LoopCase, gpu: str, directory: Path, *, num_steps: int
) -> MemoryTrace:
    """The whole trace, on a card of the catalogue; a step as it is recorded, without what a plan interpolates."""
    if isinstance(case, LoopCase):
        return predicted_loop(case, gpu=gpu, num_steps=num_steps)[1]
    config = config_of(case, directory)
    return record_step(
        config, passes_of(case), target=cuda_target(config.model, find_device(gpu))
    ).trace


@contextmanager
def traces_kept() -> Iterator[list[MemoryTrace]]:
    """The traces that predictions inside were made from."""
    kept: list[MemoryTrace] = []
    predict = prediction_module.predict_trace

    def keeping(trace: MemoryTrace, settings: PredictSettings) -> Prediction:
        kept.append(trace)
        return predict(trace, settings)

    with patch.object(prediction_module, "predict_trace", keeping):
        yield kept
