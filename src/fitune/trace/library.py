"""Keeps the recordings of one process, so that further settings of one configuration cost little.

A model of many equal layers is recorded with a few of them, and a loss of many chunks with four;
what lies between is repeated (`repeat_layers`). Two sizes of micro-batch determine all others
(`interpolate`). Where the structure is not as expected, the step is recorded anew, if necessary as
a whole.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fitune.config import ModelConfig, RunConfig
from fitune.model.load import load_config
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.patience import Patience
from fitune.recorder.record import RecordedModel
from fitune.recorder.recording import Recording
from fitune.recorder.shape_cache import ShapeMemory
from fitune.trace.equal_layers import LayerList, find_layers, first_layers
from fitune.trace.interpolate import (
    have_same_structure,
)
from fitune.trace.loop_iterations import Iterations, num_recorded_iterations
from fitune.trace.own_step import (
    ColumnsOfStep,
    Pass,
    PassLayouts,
    RecordedShape,
    RecordedStep,
    model_for,
    pass_layouts,
    record_columns_of_step,
    shape_of_step,
)
from fitune.trace.recording_family import (
    RecordingFamily,
    does_one_sample_match,
    has_one_sample,
)
from fitune.trace.resize import with_last_step_repeated

#: The number of models that are kept for further recordings.
_MOST_MODELS = 4


class Recordings:
    """Records steps, and derives them from earlier recordings where that gives the same result.

    The results are equal to those of `record_step`, event by event. Recordings are kept, results
    are not. The time that slow models may take is limited over all recordings together
    (`Patience`).
    """

    def __init__(self) -> None:
        #: by model: its equal layers
        self._layers: dict[str, LayerList | None] = {}
        #: by configuration without samples
        self._families: dict[str, list[RecordingFamily]] = {}
        #: by configuration without samples, recomputation and loss: families whose growth was
        #: measured
        self._with_growth: dict[str, list[RecordingFamily]] = {}
        #: by configuration without samples, recomputation and loss
        self._of_one_model: dict[str, list[RecordingFamily]] = {}
        self._shapes: dict[CudaTarget | None, ShapeMemory] = {}
        #: the models of the last recordings
        self._models: dict[str, RecordedModel] = {}
        self._patience = Patience()

    def renew_patience(self) -> None:
        """Give the recordings of another plan as much time as those of the first."""
        self._patience.renew()

    def step(
        self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None
    ) -> RecordedStep:
        """Return what `record_step` returns on fake tensors."""
        columns = self.columns(config, passes, target=target)
        if columns is None:
            model = model_for(config, target=target, patience=self._patience)
            columns = record_columns_of_step(config, passes, target=target, on=model)
        return columns.to_step()

    def columns(
        self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None
    ) -> ColumnsOfStep | None:
        """Return the step from short recordings, None if the whole step has to be recorded."""
        if passes[0].kind == "state" and passes[-1] == passes[-2] and passes[-1].kind == "train":
            once = self.columns(config, passes[:-1], target=target)
            if once is None:
                return None
            again = with_last_step_repeated(once.recording, len(passes) - 1)
            return None if again is None else replace(once, recording=again)
        key = repr((_without_samples(config), target))
        same_structure = []
        for family in self._families.setdefault(key, []):
            family_shape, columns = family.points[0]
            layouts = _layouts(config, columns, target=target)
            shape = shape_of_step(passes, columns, layouts)
            if shape is None or shape.structure != family_shape.structure:
                continue
            same_structure.append(family)
            found = self._derive(config, passes, family, shape, target=target)
            if found is not None:
                return family.repeat(shape, replace(columns, recording=found, layout=layouts.train))
        return self._record_point(config, passes, same_structure, target=target)

    def _record_point(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        same_structure: Sequence[RecordingFamily],
        *,
        target: CudaTarget | None,
    ) -> ColumnsOfStep | None:
        """Record a few layers and chunks, as a point of one of the families or as a new family.

        same_structure: the families that it may belong to
        """
        layers = self._layers_to_record(config.model)
        num_layers = None if layers is None else layers.num_recorded
        columns = self._record(config, passes, target=target, num_layers=num_layers)
        layouts = _layouts(config, columns, target=target)
        shape = shape_of_step(passes, columns, layouts)
        if shape is None:
            return None
        for family in same_structure:
            if have_same_structure(family.points[0][1].recording, columns.recording):
                family.points.append((shape, columns))
                return family.repeat(shape, columns)
        new = RecordingFamily([(shape, columns)])
        if layers is not None:
            new = self._with_known_growth(config, passes, new, layers, target=target)
        self._families[repr((_without_samples(config), target))].append(new)
        self._families_of_model(config, target).append(new)
        return new.repeat(shape, columns)

    def _derive(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        family: RecordingFamily,
        shape: RecordedShape,
        *,
        target: CudaTarget | None,
    ) -> Recording | None:
        """Return the recording of a step of this shape from those of its family.

        Returns None where the step itself has to be recorded.
        """
        one_sample = has_one_sample(shape) and does_one_sample_match(
            self._families_of_model(config, target), target=target
        )
        found = family.interpolate(shape, target=target, one_sample=one_sample)
        if found is not None:
            return found
        return self._add_resized_point(config, passes, family, shape, target=target)

    def _with_known_growth(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        family: RecordingFamily,
        layers: Iterations,
        *,
        target: CudaTarget | None,
    ) -> RecordingFamily:
        """Return the family with the growth of each layer, which is transferred or measured."""
        key = repr((_without_recompute_and_loss(config), target))
        known_families = self._with_growth.setdefault(key, [])
        transferred = family.with_growth_of(layers, known_families)
        if transferred is not None:
            return transferred
        num_layers = layers.num_recorded - layers.num_left_out
        fewer = self._record(config, passes, target=target, num_layers=num_layers)
        measured = family.with_measured_growth(layers, fewer)
        if measured.growth is not None:
            known_families.append(measured)
        return measured

    def _families_of_model(
        self, config: RunConfig, target: CudaTarget | None
    ) -> list[RecordingFamily]:
        key = repr((_without_recompute_and_loss(config), target))
        return self._of_one_model.setdefault(key, [])

    def _add_resized_point(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        family: RecordingFamily,
        shape: RecordedShape,
        *,
        target: CudaTarget | None,
    ) -> Recording | None:
        """Add a second point to the family, recording only one of its micro-batches.

        Returns the point's recording, None where this is not possible.
        """
        if not family.needs_second_point(shape, passes):
            return None
        ((_, point),) = family.interpolation_points(shape)
        layers = self._layers_to_record(config.model)
        num_layers = None if layers is None else layers.num_recorded
        shorter = [*passes[:-1], replace(passes[-1], most_micro_batches=1)]
        single = self._record(config, shorter, target=target, num_layers=num_layers)
        found = family.resized_point(point.recording, single.recording, passes)
        if found is None:
            family.resize_failed = True
            return None
        family.points.append((shape, replace(point, recording=found)))
        return found

    def _record(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        *,
        target: CudaTarget | None,
        num_layers: int | None = None,
    ) -> ColumnsOfStep:
        model = self._model(config, target=target, num_layers=num_layers)
        return record_columns_of_step(config, passes, target=target, on=model, skip_chunks=True)

    def _model(
        self, config: RunConfig, *, target: CudaTarget | None, num_layers: int | None
    ) -> RecordedModel:
        of_model = (
            _without_recompute(config.model),
            config.data.packing,
            config.loss,
            config.memory.routing,
        )
        key = repr((of_model, target, num_layers))
        model = self._models.pop(key, None)
        if model is None:
            architecture = None
            if num_layers is not None:
                architecture = first_layers(load_config(config.model), num_layers)
            shapes = self._shapes.setdefault(target, ShapeMemory())
            model = model_for(
                config,
                target=target,
                architecture=architecture,
                shapes=shapes,
                patience=self._patience,
            )
        # the models are in the order of their last use
        self._models[key] = model
        if len(self._models) > _MOST_MODELS:
            del self._models[next(iter(self._models))]
        return model

    def _layers_to_record(self, model: ModelConfig) -> Iterations | None:
        """Return how few of the model's layers are enough, None if all have to be recorded."""
        if model.method == "freeze":
            # A layer above a trained one keeps what a frozen one below it does not.
            return None
        key = repr((model.source, model.shape, model.trust_remote_code))
        if key not in self._layers:
            self._layers[key] = find_layers(model)
        found = self._layers[key]
        if found is None or (equal := found.find_equal(model.recompute)) is None:
            return None
        number = num_recorded_iterations(equal.num_layers, equal.period)
        if number >= equal.num_layers:
            return None
        kinds = found.signatures
        num_with_all_kinds = 1 + max(kinds.index(kind) for kind in kinds)
        return Iterations(equal.name, equal.period, number, equal.num_layers, num_with_all_kinds)


def _layouts(
    config: RunConfig, columns: ColumnsOfStep, *, target: CudaTarget | None
) -> PassLayouts:
    device = torch.device("cpu" if target is None else "cuda")
    return pass_layouts(config, device, packed=columns.layout.packed)


def _without_samples(config: RunConfig) -> tuple[object, ...]:
    """Return all that a recording depends on but its samples."""
    return (
        config.model,
        config.data.packing,
        config.optim,
        config.loss,
        config.objective,
        config.preference,
        config.train.label_smoothing,
        config.memory.routing,
    )


def _without_recompute_and_loss(config: RunConfig) -> tuple[object, ...]:
    """Return what a recording depends on besides its samples, recomputation and loss.

    This is which layers there are, and what is done with each.
    """
    return (
        _without_recompute(config.model),
        config.data.packing,
        config.optim,
        config.objective,
        config.preference,
        config.train.label_smoothing,
        config.memory.routing,
    )


def _without_recompute(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"recompute": "off", "offload_activations": False})
