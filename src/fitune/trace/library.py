"""Recordings of one process, kept, so that further settings of one configuration cost little.

A model of many equal layers is recorded with a few of them, a loss of many chunks with four; what is between is
repeated. Two sizes of micro-batch give all others. Where the structure is not as expected (`extrapolate`), the step is
recorded afresh, in the end as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import torch

from fitune.config import ModelConfig, RunConfig
from fitune.model.load import load_config
from fitune.step.assemble import choose_layouts
from fitune.trace.cuda_target import CudaTarget
from fitune.trace.equal_layers import LayerList, find_layers, first_layers
from fitune.trace.events import ROUTED
from fitune.trace.interpolate import (
    SizedRecording,
    are_equal,
    have_same_structure,
    interpolate_recordings,
)
from fitune.trace.loop_growth import Growth, find_growth, transfer_growth
from fitune.trace.loop_iterations import NUM_RECORDED_CHUNKS, Iterations, num_recorded_iterations
from fitune.trace.own_step import (
    ColumnsOfStep,
    Pass,
    RecordedStep,
    StepShape,
    first_rows,
    model_for,
    record_columns_of_step,
    shape_of_step,
)
from fitune.trace.patience import Patience
from fitune.trace.record import RecordedModel
from fitune.trace.recording import Recording
from fitune.trace.repeat_layers import repeat_inner_iterations, repeat_iterations
from fitune.trace.resize import resize, with_last_step_repeated
from fitune.trace.shape_cache import ShapeMemory

_MOST_MODELS = 4
"""Models that are kept for the next recording."""


@dataclass
class _Family:
    """Recordings that differ in their rows alone, with a few layers and chunks. turns and growth: None where all layers
    were recorded. resists: whether a short recording did not do for another number of rows."""

    points: list[tuple[StepShape, ColumnsOfStep]] = field(default_factory=list)
    iterations: Iterations | None = None
    growth: Growth | None = None
    num_parameters: tuple[int, int] = (0, 0)
    resize_failed: bool = False
    one_row_matches: bool | None = None


@dataclass(frozen=True)
class _Recorded:
    """A step as it was recorded, with a few layers and chunks."""

    config: RunConfig
    passes: Sequence[Pass]
    columns: ColumnsOfStep


class Recordings:
    """What was recorded is kept, answers are not. They are equal to those of `record_step`, event by event. What takes
    long is limited over all recordings together (`Patience`)."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerList | None] = {}
        self._families: dict[str, list[_Family]] = {}
        self._with_growth_by_key: dict[str, list[_Family]] = {}
        self._recorded: dict[str, list[_Recorded]] = {}
        self._of_one_model: dict[str, list[_Family]] = {}
        self._shapes: dict[CudaTarget | None, ShapeMemory] = {}
        self._models: dict[str, RecordedModel] = {}
        self._patience = Patience()

    def step(
        self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None
    ) -> RecordedStep:
        """As `record_step` on fake tensors."""
        columns = self.columns(config, passes, target=target)
        if columns is None:
            model = model_for(config, target=target, patience=self._patience)
            columns = record_columns_of_step(config, passes, target=target, on=model)
        return columns.to_step()

    def columns(
        self, config: RunConfig, passes: Sequence[Pass], *, target: CudaTarget | None
    ) -> ColumnsOfStep | None:
        """The step from a short recording; None where the whole has to be recorded."""
        if passes[0].kind == "state" and passes[-1] == passes[-2] and passes[-1].kind == "train":
            once = self.columns(config, passes[:-1], target=target)
            again = (
                None if once is None else with_last_step_repeated(once.recording, len(passes) - 1)
            )
            return None if once is None or again is None else replace(once, recording=again)
        device = torch.device("cpu" if target is None else "cuda")
        key = repr((_key_without_samples(config), target))
        families, recorded = self._families.setdefault(key, []), self._recorded.setdefault(key, [])
        of_one_model = self._of_one_model.setdefault(repr((_key_of_layers(config), target)), [])
        same_structure = []
        for family in families:
            columns = family.points[0][1]
            shape = shape_of_step(config, passes, columns, device=device)
            if shape is not None and shape.structure == family.points[0][0].structure:
                same_structure.append(family)
                one_row = _has_one_row(shape) and _one_row_matches(of_one_model, target=target)
                found = _interpolate(family, shape, target=target, one_row=one_row)
                if found is None and any(
                    _add_point_from(family, shape, config, passes, each, device=device)
                    for each in recorded
                ):
                    found = _interpolate(family, shape, target=target)
                if found is None:
                    found = self._add_resized_point(config, passes, family, shape, target=target)
                if found is not None:
                    layout, _ = choose_layouts(config, device, packed=columns.layout.packed)
                    return _repeat(family, shape, replace(columns, recording=found, layout=layout))
        layers = self._layers_to_record(config.model)
        columns = self._record(
            config,
            passes,
            target=target,
            num_layers=None if layers is None else layers.num_recorded,
        )
        recorded.append(_Recorded(config, passes, columns))
        shape = shape_of_step(config, passes, columns, device=device)
        if shape is None:
            return None
        for family in same_structure:
            if have_same_structure(family.points[0][1].recording, columns.recording):
                family.points.append((shape, columns))
                return _repeat(family, shape, columns)
        new = _Family([(shape, columns)])
        if layers is not None:
            with_growth = self._with_growth_by_key.setdefault(
                repr((_key_of_layers(config), target)), []
            )
            known = _transfer_known_growth(new, layers, with_growth)
            if known is None:
                fewer = self._record(
                    config,
                    passes,
                    target=target,
                    num_layers=layers.num_recorded - layers.num_left_out,
                )
                known = _measure_growth(new, layers, fewer)
                if known.growth is not None:
                    with_growth.append(known)
            new = known
        families.append(new)
        of_one_model.append(new)
        return _repeat(new, shape, columns)

    def _add_resized_point(
        self,
        config: RunConfig,
        passes: Sequence[Pass],
        family: _Family,
        shape: StepShape,
        *,
        target: CudaTarget | None,
    ) -> Recording | None:
        """A second sample, of which one micro-batch is recorded alone. None where that does not do."""
        if not _needs_second_point(family, shape, passes):
            return None
        ((_, point),) = _interpolation_points(family, shape)
        layers = self._layers_to_record(config.model)
        single = self._record(
            config,
            [*passes[:-1], replace(passes[-1], most_micro_batches=1)],
            target=target,
            num_layers=None if layers is None else layers.num_recorded,
        )
        found = _resized(family, point.recording, single.recording, passes)
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
            _without_recompute(config),
            config.data.packing,
            config.loss,
            config.memory.routing,
        )
        key = repr((of_model, target, num_layers))
        model = self._models.pop(key, None)
        if model is None:
            architecture = (
                None if num_layers is None else first_layers(load_config(config.model), num_layers)
            )
            shapes = self._shapes.setdefault(target, ShapeMemory())
            model = model_for(
                config,
                target=target,
                architecture=architecture,
                shapes=shapes,
                patience=self._patience,
            )
        self._models[key] = model  # the latest last
        if len(self._models) > _MOST_MODELS:
            del self._models[next(iter(self._models))]
        return model

    def _layers_to_record(self, model: ModelConfig) -> Iterations | None:
        """None where a few layers do not stand for all."""
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
        within = 1 + max(kinds.index(kind) for kind in kinds)
        return Iterations(equal.name, equal.period, number, equal.num_layers, within)


def _transfer_known_growth(
    family: _Family, layers: Iterations, with_growth: Sequence[_Family]
) -> _Family | None:
    """Of another family, whose rows or recomputing are others."""
    ((_, columns),) = family.points
    for known in with_growth:
        assert known.iterations is not None
        assert known.growth is not None
        iterations = replace(layers, loop=known.iterations.loop)
        of = known.points[0][1].recording
        growth = transfer_growth(
            columns.recording,
            iterations,
            growth=known.growth,
            of=of,
            of_iterations=known.iterations,
        )
        if growth is not None:
            return _Family(family.points, iterations, growth, known.num_parameters)
    return None


def _measure_growth(family: _Family, layers: Iterations, fewer: ColumnsOfStep) -> _Family:
    """layers: whose loop is named as in the model without adapters."""
    ((_, columns),) = family.points
    loops = [name for name in columns.recording.loops if f".{name}".endswith(f".{layers.loop}")]
    iterations = replace(layers, loop=loops[0]) if len(loops) == 1 else layers
    growth = find_growth(columns.recording, iterations, fewer=fewer.recording) if loops else None

    def with_growth(one: int, other: int) -> int:
        return (
            one
            + (one - other) * (layers.num_iterations - layers.num_recorded) // layers.num_left_out
        )

    totals = (
        with_growth(columns.num_parameters, fewer.num_parameters),
        with_growth(columns.num_trainable_parameters, fewer.num_trainable_parameters),
    )
    return _Family(family.points, iterations, growth, totals)


def _interpolate(
    family: _Family, shape: StepShape, *, target: CudaTarget | None, one_row: bool = False
) -> Recording | None:
    """one_row: whether `counts`, of one row, is known to be on the line of several."""
    points = [
        SizedRecording(columns.recording, mine.sizes)
        for mine, columns in _interpolation_points(family, shape, one_row=one_row)
    ]
    for one, other in combinations(
        points, 2
    ):  # two whose last chunks are equal tell nothing of another's
        if _growth_depends_on_rows(family, one.recording, other.recording):
            return None
        found = interpolate_recordings(one, other, sizes=shape.sizes, target=target)
        if found is not None:
            return found
    return None


def _needs_second_point(family: _Family, shape: StepShape, passes: Sequence[Pass]) -> bool:
    """Whether a recording of one micro-batch can be a second sample of the family, which does two at the end."""
    kinds = [each.kind for each in passes]
    is_short = kinds[-1] == "train" and kinds.count("train") == 1
    return is_short and not family.resize_failed and len(_interpolation_points(family, shape)) == 1


def _add_point_from(
    family: _Family,
    shape: StepShape,
    config: RunConfig,
    passes: Sequence[Pass],
    other: _Recorded,
    *,
    device: torch.device,
) -> bool:
    """Whether `other`, with more rows in its first micro-batch, made a second sample of the family."""
    if not _needs_second_point(family, shape, passes) or len(other.passes) != len(passes):
        return False
    ((mine, point),) = _interpolation_points(family, shape)
    packed = point.layout.packed
    rows = first_rows(config, passes[-1], device=device, packed=packed)
    times, rest = divmod(
        len(first_rows(other.config, other.passes[-1], device=device, packed=packed)), len(rows)
    )
    wanted = [replace(each, rows=each.rows * times) for each in passes]
    if (
        rest
        or times < 2
        or wanted[:-1] != list(other.passes[:-1])
        or other.passes[-1].kind != "train"
    ):
        return False
    theirs = shape_of_step(other.config, wanted, point, device=device)
    if theirs is None or theirs.structure != mine.structure or theirs.sizes == mine.sizes:
        return False
    found = _resized(family, point.recording, other.columns.recording, passes)
    if found is None:
        return False
    family.points.append((theirs, replace(point, recording=found)))
    return True


def _resized(
    family: _Family, recording: Recording, single: Recording, passes: Sequence[Pass]
) -> Recording | None:
    found = resize(recording, single, kinds=[each.kind for each in passes])
    return None if found is None or _growth_depends_on_rows(family, recording, found) else found


def _interpolation_points(
    family: _Family, shape: StepShape, *, one_row: bool = False
) -> list[tuple[StepShape, ColumnsOfStep]]:
    """Those that can be on a line with `counts`: one row may have another structure than several, and tokens per expert
    are rounded up."""
    routed = any(
        line in columns.recording.source for line in ROUTED.values() for _, columns in family.points
    )
    if routed or (_has_one_row(shape) and not one_row):
        return []
    return [each for each in family.points if not _has_one_row(each[0])]


def _has_one_row(shape: StepShape) -> bool:
    return min(shape.sizes.by_step.values()) < 2


def _one_row_matches(families: Sequence[_Family], *, target: CudaTarget | None) -> bool:
    """Whether a recording of one row was what follows from those of several, wherever both are known. Recomputing and
    the loss call what the model's forward calls, so what is seen of one holds for the others."""
    for family in families:
        if family.one_row_matches is None:
            family.one_row_matches = _compare_one_row(family, target=target)
    known = {family.one_row_matches for family in families}
    return True in known and False not in known


def _compare_one_row(family: _Family, *, target: CudaTarget | None) -> bool | None:
    recorded = next((each for each in family.points if _has_one_row(each[0])), None)
    if recorded is None or len(_interpolation_points(family, recorded[0], one_row=True)) < 2:
        return None
    shape, columns = recorded
    found = _interpolate(family, shape, target=target, one_row=True)
    return found is not None and are_equal(found, columns.recording)


def _growth_depends_on_rows(family: _Family, one: Recording, other: Recording) -> bool:
    """A product of rows and layers: its growth was measured for other rows."""
    return family.growth is not None and bool(
        np.any((family.growth.num_bytes != 0) & (one.num_bytes != other.num_bytes))
    )


def _key_without_samples(config: RunConfig) -> tuple[object, ...]:
    """What a recording depends on besides its rows."""
    return config.model, config.data.packing, config.optim, config.loss, config.memory.routing


def _key_of_layers(config: RunConfig) -> tuple[object, ...]:
    """What that depends on besides recomputing and the loss: which layers there are, and what is done with each."""
    return _without_recompute(config), config.data.packing, config.optim, config.memory.routing


def _without_recompute(config: RunConfig) -> ModelConfig:
    return config.model.model_copy(update={"recompute": "off", "offload_activations": False})


def _repeat(family: _Family, shape: StepShape, columns: ColumnsOfStep) -> ColumnsOfStep | None:
    """With all layers and chunks; None where those that were recorded are not equal. The chunks come first, while there
    are few layers."""
    if family.iterations is not None and family.growth is None:
        return None
    recording, growth = columns.recording, family.growth
    for loop, number in shape.num_chunks.items():
        if number > NUM_RECORDED_CHUNKS:
            found = repeat_inner_iterations(
                recording, Iterations(loop, 1, NUM_RECORDED_CHUNKS, number), outer=growth
            )
            if found is None:
                return None
            recording, growth = found
    if family.iterations is None:
        return replace(columns, recording=recording)
    repeated = repeat_iterations(recording, family.iterations, growth=growth)
    total, trainable = family.num_parameters
    return (
        None
        if repeated is None
        else replace(
            columns, recording=repeated, num_parameters=total, num_trainable_parameters=trainable
        )
    )
