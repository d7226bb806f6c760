"""Says what a step, an evaluation, a recording and a recovery ask of the objective of a run.

The loss of an effective batch is the sum over its micro-batches of `loss_sum`, divided once by the
loss weights of all its samples (`Row.loss_weight`). So an objective trains alike in every split if
`loss_sum` is a sum over samples, and a sample is what is never split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fitune.data.rows import MicroBatch, Row

#: One pass over all chunks of a micro-batch: in the forward of training, in its backward where the
#: logits are computed again there, in an evaluation, in a survey of the whole batch, or in the
#: forward of a reference that one of these compares with.
Sweep = Literal[
    "train", "backward", "eval", "reference", "eval_reference",
    "survey", "survey_reference", "eval_survey", "eval_survey_reference",
]  # fmt: skip
#: The supervised tokens whose logits exist at the same time, at least. 256 tokens with a vocabulary
#: of 151,936 take 148 MiB in float32.
CHUNK_TOKENS = 256


def has_no_graph(sweep: Sweep) -> bool:
    """Return whether a pass keeps nothing for a backward, so that its logits are its peak."""
    return sweep not in ("train", "backward")


@dataclass(frozen=True, slots=True)
class Chunking:
    """How many supervised tokens have logits at the same time."""

    train_tokens: int = CHUNK_TOKENS
    #: whether the backward computes the logits again
    again: bool = False
    #: whether each micro-batch runs a reference too
    has_reference: bool = False
    #: whether the batch is surveyed first
    surveys: bool = False

    @property
    def eval_tokens(self) -> int:
        """As `train_tokens`, of an evaluation, whose peak is its logits alone."""
        return min(self.train_tokens, CHUNK_TOKENS)

    def sweeps(self, *, evaluates: bool) -> tuple[Sweep, ...]:
        """Return the passes over the chunks of one micro-batch."""
        found: list[Sweep] = ["eval"] if evaluates else ["train"]
        if self.again and not evaluates:
            found.append("backward")
        if self.has_reference:
            found.append("eval_reference" if evaluates else "reference")
        if self.surveys:
            found.append("eval_survey" if evaluates else "survey")
        if self.surveys and self.has_reference:
            found.append("eval_survey_reference" if evaluates else "survey_reference")
        return tuple(found)

    def slices(self, num_tokens: int, *, evaluates: bool = False) -> list[slice]:
        """Return the slices that cut this number of supervised tokens into chunks."""
        chunk_tokens = self.eval_tokens if evaluates else self.train_tokens
        return [
            slice(start, min(start + chunk_tokens, num_tokens))
            for start in range(0, num_tokens, chunk_tokens)
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation of one micro-batch found, on the device."""

    #: float64 [K, R]: the loss of each sample, not divided by its weight, the weight, and what
    #: else `Objective.settle` needs
    rows_KR: Tensor
    #: sums over the micro-batch, by the names of `Objective.totals`
    totals: Mapping[str, Tensor]


class Objective(Protocol):
    """What a run minimises, for one model."""

    @property
    def totals(self) -> Mapping[str, torch.dtype]:
        """What an evaluation sums over all samples beside the loss, and the dtype of each sum."""
        ...

    @property
    def chunking(self) -> Chunking | None:
        """How the logits are computed in chunks; None if all of them exist at the same time."""
        ...

    @property
    def means(self) -> tuple[str, ...]:
        """The fields of `StepMetrics` that a training step has beside its loss."""
        ...

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the losses of a micro-batch, a float32 scalar with its graph.

        Where the objective has `means`, it is a vector: the loss, and then the sum of each of them
        over the samples, without a graph. Without targets all are 0, with zero gradients.
        """
        ...

    @property
    def surveys(self) -> bool:
        """Whether the loss of a sample depends on a mean over the whole batch."""
        ...

    def survey(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the sum over the samples whose mean over the batch the loss depends on.

        A step calls it for all micro-batches before the first `loss_sum`.
        """
        ...

    def knowing(self, mean: Tensor) -> Self:
        """Return the objective of a batch with this mean of its survey, on the device."""
        ...

    def step_metrics(self, means: Sequence[float]) -> dict[str, float | None]:
        """Return the fields of `StepMetrics` of a step with these `means`."""
        ...

    def settle(self, rows_KR: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of each sample [R] once all are evaluated, and further totals.

        rows_KR: those of all micro-batches, on the host.
        """
        ...

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> Measured:
        """Return the losses of a micro-batch, and the totals."""
        ...

    def metrics(
        self, loss: float, totals: Mapping[str, float], *, loss_weight: float, num_targets: int
    ) -> dict[str, float]:
        """Return the fields of `EvalMetrics` that an evaluation has beside its loss.

        All are of all evaluated samples. The loss is divided by their weight already.
        """
        ...

    def made_up_row(self, row_id: int, ids: npt.NDArray[np.integer], num_targets: int) -> Row:
        """Return a sample of these tokens, of which the last `num_targets` are targets.

        Predictions, measurements and the check of the model take such samples.
        """
        ...

    def smaller(self, model: nn.Module | None) -> tuple[Self, str] | None:
        """Return the same objective in less memory, and a name for that; None if there is no way.

        model: where to look for what that needs; None if it may not run a forward.
        """
        ...

    def watched(self, watch: Callable[[list[slice], Sweep], Iterable[slice]]) -> Self:
        """Return the same objective with `watch` between it and its chunks, for a recording.

        watch: gets the chunks of one micro-batch and what computes them, and yields those to
            compute.
        """
        ...
