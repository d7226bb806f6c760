"""Groups recordings that differ in their samples alone, so that some give the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import ROUTED
from fitune.recorder.recording import Recording
from fitune.trace.interpolate import (
    SizedRecording,
    are_equal,
    interpolate_recordings,
)
from fitune.trace.loop_growth import Growth, find_growth, transfer_growth
from fitune.trace.loop_iterations import NUM_RECORDED_CHUNKS, Iterations
from fitune.trace.own_step import (
    ColumnsOfStep,
    Pass,
    RecordedShape,
)
from fitune.trace.repeat_layers import repeat_inner_iterations, repeat_iterations
from fitune.trace.resize import resize


@dataclass
class RecordingFamily:
    """Recordings with a few layers and chunks that differ in their samples alone."""

    #: The first one has the structure that all share.
    points: list[tuple[RecordedShape, ColumnsOfStep]] = field(default_factory=list)
    #: the layers; None, like `growth`, if all of them were recorded
    iterations: Iterations | None = None
    growth: Growth | None = None
    #: of the model with all layers: all parameters and the trainable ones
    num_parameters: tuple[int, int] = (0, 0)
    #: whether `resize` could not derive a point from a shorter recording
    resize_failed: bool = False
    #: whether the recording of one sample is on the line through the others; None if not compared
    one_sample_matches: bool | None = None

    def with_growth_of(
        self, layers: Iterations, known_families: Sequence["RecordingFamily"]
    ) -> "RecordingFamily | None":
        """Return the family with the growth of one whose samples or recomputation differ.

        Returns None if no growth applies.
        """
        ((_, columns),) = self.points
        for known in known_families:
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
                return RecordingFamily(self.points, iterations, growth, known.num_parameters)
        return None

    def with_measured_growth(self, layers: Iterations, fewer: ColumnsOfStep) -> "RecordingFamily":
        """Return the family with the growth that a recording with fewer layers shows.

        layers: their loop is named as in the model without adapters
        """
        ((_, columns),) = self.points
        loops = [name for name in columns.recording.loops if f".{name}".endswith(f".{layers.loop}")]
        iterations = replace(layers, loop=loops[0]) if len(loops) == 1 else layers
        growth = (
            find_growth(columns.recording, iterations, fewer=fewer.recording) if loops else None
        )

        num_more = layers.num_iterations - layers.num_recorded

        def of_all_layers(number: int, number_of_fewer: int) -> int:
            return number + (number - number_of_fewer) * num_more // layers.num_left_out

        totals = (
            of_all_layers(columns.num_parameters, fewer.num_parameters),
            of_all_layers(columns.num_trainable_parameters, fewer.num_trainable_parameters),
        )
        return RecordingFamily(self.points, iterations, growth, totals)

    def interpolate(
        self, shape: RecordedShape, *, target: CudaTarget | None, one_sample: bool = False
    ) -> Recording | None:
        """Return the recording of a step of this shape from two points of the family.

        one_sample: whether a micro-batch of one sample is known to be on the line of larger ones

        Returns None if no two points determine it.
        """
        points = [
            SizedRecording(columns.recording, own_shape.sizes)
            for own_shape, columns in self.interpolation_points(shape, one_sample=one_sample)
        ]
        # two recordings whose last chunks of the loss are equally long say nothing of a chunk of
        # another length, so further pairs are tried
        for one, other in combinations(points, 2):
            if self._growth_depends_on_samples(one.recording, other.recording):
                return None
            found = interpolate_recordings(one, other, sizes=shape.sizes, target=target)
            if found is not None:
                return found
        return None

    def interpolation_points(
        self, shape: RecordedShape, *, one_sample: bool = False
    ) -> list[tuple[RecordedShape, ColumnsOfStep]]:
        """Return the points that can be on a line with a step of this shape.

        There are none with a mixture of experts, whose tokens per expert are rounded up.
        Micro-batches of one sample may have another structure than larger ones, so they are left
        out unless `one_sample` says that they match.
        """
        routed = any(
            line in columns.recording.source
            for line in ROUTED.values()
            for _, columns in self.points
        )
        if routed or (has_one_sample(shape) and not one_sample):
            return []
        return [each for each in self.points if not has_one_sample(each[0])]

    def needs_second_point(self, shape: RecordedShape, passes: Sequence[Pass]) -> bool:
        """Return whether the family lacks a second point that one micro-batch can give.

        A family whose steps end with two training steps cannot use one.
        """
        kinds = [each.kind for each in passes]
        is_short = kinds[-1] == "train" and kinds.count("train") == 1
        return is_short and not self.resize_failed and len(self.interpolation_points(shape)) == 1

    def resized_point(
        self, recording: Recording, single: Recording, passes: Sequence[Pass]
    ) -> Recording | None:
        """Return the recording with the sizes of `single`, None if that is not possible."""
        found = resize(recording, single, kinds=[each.kind for each in passes])
        return None if found is None or self._growth_depends_on_samples(recording, found) else found

    def compare_one_sample(self, *, target: CudaTarget | None) -> bool | None:
        """Return whether the recording of one sample equals what larger ones give.

        Returns None where this is not known.
        """
        recorded = next((each for each in self.points if has_one_sample(each[0])), None)
        if recorded is None or len(self.interpolation_points(recorded[0], one_sample=True)) < 2:
            return None
        shape, columns = recorded
        found = self.interpolate(shape, target=target, one_sample=True)
        return found is not None and are_equal(found, columns.recording)

    def _growth_depends_on_samples(self, one: Recording, other: Recording) -> bool:
        """Return whether a size depends on both the samples and the number of layers.

        The growth was measured for other samples then, and does not apply.
        """
        return self.growth is not None and bool(
            np.any((self.growth.num_bytes != 0) & (one.num_bytes != other.num_bytes))
        )

    def repeat(self, shape: RecordedShape, columns: ColumnsOfStep) -> ColumnsOfStep | None:
        """Return the columns with all layers and chunks, None if the recorded ones are not equal.

        The chunks are repeated first, while there are few layers.
        """
        if self.iterations is not None and self.growth is None:
            return None
        recording, growth = columns.recording, self.growth
        for loop, number in shape.num_chunks.items():
            if number > NUM_RECORDED_CHUNKS:
                chunks = Iterations(loop, 1, NUM_RECORDED_CHUNKS, number)
                found = repeat_inner_iterations(recording, chunks, outer=growth)
                if found is None:
                    return None
                recording, growth = found
        if self.iterations is None:
            return replace(columns, recording=recording)
        repeated = repeat_iterations(recording, self.iterations, growth=growth)
        total, trainable = self.num_parameters
        if repeated is None:
            return None
        return replace(
            columns, recording=repeated, num_parameters=total, num_trainable_parameters=trainable
        )


def has_one_sample(shape: RecordedShape) -> bool:
    return min(shape.sizes.by_step.values()) < 2


def does_one_sample_match(
    families: Sequence[RecordingFamily], *, target: CudaTarget | None
) -> bool:
    """Return whether recordings of one sample are what larger ones give, where both exist.

    Recomputation and the loss call what the model's forward calls, so what is true of one family is
    true of the others.
    """
    for family in families:
        if family.one_sample_matches is None:
            family.one_sample_matches = family.compare_one_sample(target=target)
    known = {family.one_sample_matches for family in families}
    return True in known and False not in known
