"""Recordings of one process, kept, so that further settings of one configuration cost little.

A model of many equal layers is recorded with a few of them, a loss of many chunks with four; what is between is
repeated (`extrapolate`). Where the structure is not as expected everything is recorded.
"""

from collections.abc import Sequence
from dataclasses import replace

from fitune.config import ModelConfig, RunConfig
from fitune.model.layers import EqualLayers, find_equal_layers, first_layers
from fitune.model.load import load_config
from fitune.trace.cuda_behaviour import CudaTarget
from fitune.trace.extrapolate import Turns, num_recorded_turns, repeat_turns
from fitune.trace.step import NUM_RECORDED_CHUNKS, ColumnsOfStep, Pass, RecordedStep, record_columns_of_step


class Recordings:
    """Grows with each question. Answers are equal to those of `record_step`, event by event."""

    def __init__(self) -> None:
        self._answers: dict[str, RecordedStep] = {}
        self._layers: dict[str, EqualLayers | None] = {}

    def step(self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None) -> RecordedStep:
        """As `record_step` on fake tensors."""
        what = config.model, config.data.packing, config.batch, config.optim, config.loss, config.eval
        key = repr((what, tuple(passes), target))
        if key not in self._answers:
            columns = self._short(config, passes, target=target)
            if columns is None:
                columns = record_columns_of_step(config, passes, target=target)
            self._answers[key] = columns.to_step()
        return self._answers[key]

    def _short(self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None) -> ColumnsOfStep | None:
        """With its layers and chunks repeated; None where they cannot be."""
        layers = self._equal_layers(config.model)
        num_layers = None if layers is None else num_recorded_turns(layers.num_layers, layers.period)
        if layers is None or num_layers is None or num_layers >= layers.num_layers:
            return repeat_chunks(record_columns_of_step(config, passes, target=target, skip_chunks=True))
        num_fewer = num_layers - 2 * layers.period
        whole = load_config(config.model)
        columns, fewer = (
            record_columns_of_step(
                config, passes, target=target, architecture=first_layers(whole, number), skip_chunks=True
            )
            for number in (num_layers, num_fewer)
        )
        repeated = repeat_layers(columns, fewer, layers)
        return None if repeated is None else repeat_chunks(repeated)

    def _equal_layers(self, model: ModelConfig) -> EqualLayers | None:
        key = repr((model.source, model.shape, model.recompute, model.trust_remote_code))
        if key not in self._layers:
            self._layers[key] = find_equal_layers(model)
        return self._layers[key]


def repeat_layers(columns: ColumnsOfStep, fewer: ColumnsOfStep, layers: EqualLayers) -> ColumnsOfStep | None:
    """What was recorded with two numbers of layers, for all layers."""
    loops = [name for name in columns.recording.loops if f".{name}".endswith(f".{layers.name}")]
    if len(loops) != 1:
        return None
    num_recorded = num_recorded_turns(layers.num_layers, layers.period)
    turns = Turns(loops[0], layers.period, num_recorded, layers.num_layers)
    recording = repeat_turns(columns.recording, turns, fewer=fewer.recording)
    if recording is None:
        return None

    def grown(one: int, other: int) -> int:
        return one + (one - other) * (layers.num_layers - num_recorded) // (2 * layers.period)

    return replace(
        columns,
        recording=recording,
        num_parameters=grown(columns.num_parameters, fewer.num_parameters),
        num_trainable_parameters=grown(columns.num_trainable_parameters, fewer.num_trainable_parameters),
    )


def repeat_chunks(columns: ColumnsOfStep) -> ColumnsOfStep | None:
    """What was recorded with the first chunks of the loss and the last, for all chunks."""
    recording = columns.recording
    for loop, counts in columns.num_chunks.items():
        if max(counts) <= NUM_RECORDED_CHUNKS:
            continue
        if len(counts) > 1:
            return None
        repeated = repeat_turns(recording, Turns(loop, 1, NUM_RECORDED_CHUNKS, max(counts)))
        if repeated is None:
            return None
        recording = repeated
    return replace(columns, recording=recording)
