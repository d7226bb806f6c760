"""Define the data types of training: a tokenised sample, a batch, and a micro-batch of tensors.

Shape suffixes here, in `objectives/` and in `step/`:

    B  samples of a micro-batch            S  tokens of a padded sample
    T  tokens of a micro-batch, flattened: B * S when padded, the sum of the lengths when packed
    Q  sequences of a micro-batch: one a sample, or two of a pair
    R  samples of a micro-batch of preferences
    N  supervised targets of a micro-batch
    D  hidden size                         V  vocabulary size
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Judged:
    """What a sample of preferences has besides its tokens. Its loss weight is 1."""

    #: the tokens of the chosen answer with its prompt; those of the rejected one follow
    chosen_tokens: int
    #: the log-probability of the chosen and of the rejected answer under the reference, where the
    #: objective has one
    reference: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Labelled:
    """What an answer that is desirable or not has besides its tokens. Its loss weight is 1."""

    is_desirable: bool
    #: token ids and loss weights of its prompt with the answer to another one; None of such a
    #: sequence itself
    mismatched: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None
    #: the log-probability of its own and of the mismatched answer under the reference, where these
    #: are kept
    reference: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised sample, which nothing parts: one sequence, or the two sequences of a pair."""

    row_id: int
    #: int32 [length]
    input_ids: npt.NDArray[np.int32]
    #: float32 [length]: the weight of token i *as a target*, 1 for an ordinary supervised token
    #: and 0 for one that is not supervised. It is 0 for the first token of a sequence, because no
    #: token predicts that one.
    loss_weights: npt.NDArray[np.float32]
    #: of preferences
    judged: Judged | Labelled | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """The tokens of each of its sequences, which do not attend to each other."""
        if not isinstance(self.judged, Judged):
            return (len(self),)
        return self.judged.chosen_tokens, len(self) - self.judged.chosen_tokens

    def sequences(
        self,
    ) -> tuple[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]], ...]:
        """Return token ids and loss weights of each of its sequences."""
        ends = list(accumulate(self.sequence_lengths))
        parts = [
            slice(end - length, end)
            for end, length in zip(ends, self.sequence_lengths, strict=True)
        ]
        return tuple((self.input_ids[part], self.loss_weights[part]) for part in parts)

    @property
    def compared(self) -> tuple[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]], ...]:
        """The two sequences of a sample of preferences whose log-probabilities are compared."""
        if isinstance(self.judged, Labelled) and self.judged.mismatched is not None:
            return (*self.sequences(), self.judged.mismatched)
        return self.sequences()

    @property
    def padded_tokens(self) -> int:
        """Its tokens if its sequences are padded to the longest of them."""
        return max(self.sequence_lengths) * len(self.sequence_lengths)

    @property
    def loss_weight(self) -> float:
        """Its part of the weight N that the losses of an effective batch are divided by."""
        if self.judged is not None:
            return float(self.loss_weights.any())
        return float(self.loss_weights.sum(dtype=np.float64))

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.loss_weights))


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples that one optimizer step trains on, in the sampler's order."""

    rows: tuple[Row, ...]

    @property
    def row_ids(self) -> tuple[int, ...]:
        return tuple(row.row_id for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(row.num_targets for row in self.rows)

    @property
    def loss_weight(self) -> float:
        """Return N, by which the optimizer step divides the sum of the token losses.

        It equals `num_supervised_tokens` unless messages have loss weights of their own.
        """
        return float(sum(row.loss_weight for row in self.rows))


def sequences_of(rows: Iterable[Row]) -> Batch:
    """Return both compared sequences of samples as samples of their own, numbered in order."""
    return Batch(
        tuple(
            Row(2 * row.row_id + place, *sequence)
            for row in rows
            for place, sequence in enumerate(row.compared)
        )
    )


#: The tensor fields of `MicroBatch`. The types with the widest elements come first, so that each
#: tensor is aligned when their bytes are joined.
TENSORS = ("input_ids_BS", "position_ids_BS", "target_index_N", "target_ids_N", "target_weights_N")
#: those of `Answers`, in the same order
ANSWER_TENSORS = ("target_place_N", "facts_R4")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a micro-batch of preferences has besides the tokens of its sequences.

    The values of its targets are summed by sequence in a grid of one line a sequence, which gives
    the same result in every run; adding by index would not, on a GPU.
    """

    #: the answers of a sample: 2 of a pair, else 1
    per_sample: int
    #: places of a line of the grid: the targets of the sequence with the most
    most_targets: int
    #: int64: the place of each target in the grid of Q * most_targets
    target_place_N: torch.Tensor
    #: float32: the loss weight of each sample, its two log-probabilities under the reference, and
    #: 1 unless it is an answer that is not desirable
    facts_R4: torch.Tensor
    #: of labelled answers: the same samples with the mismatched answers
    mismatched: "MicroBatch | None" = None

    @property
    def weights(self) -> torch.Tensor:
        """The loss weights [R]."""
        return self.facts_R4[:, 0]

    @property
    def reference(self) -> torch.Tensor:
        """The log-probabilities under the reference [R, 2]."""
        return self.facts_R4[:, 1:3]

    @property
    def desirable(self) -> torch.Tensor:
        """1 of each sample whose answer is desirable, else 0 [R]."""
        return self.facts_R4[:, 3]

    def sum_by_sequence(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum a value of each target over those of each sequence: [R, per_sample], with a graph."""
        num_places = self.per_sample * len(self.facts_R4) * self.most_targets
        grid = values_N.new_zeros(num_places).index_copy(0, self.target_place_N, values_N)
        return grid.view(-1, self.per_sample, self.most_targets).sum(-1)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward and backward pass.

    It contains tensors, and the same facts as Python numbers. With those, no shape in the step
    depends on tensor data, and the step never waits for the device.

    A packed micro-batch has B = 1 and S = T: its sequences follow one another, and the positions
    restart at each. A padded one has its sequences padded on the right; the causal mask makes
    an attention mask unnecessary. A sample is one sequence; a pair is two, the chosen one first.
    """

    row_ids: tuple[int, ...]
    #: the tokens of each sequence; when packed they define the boundaries between sequences
    row_lengths: tuple[int, ...]
    packed: bool
    #: int64
    input_ids_BS: torch.Tensor
    #: int64
    position_ids_BS: torch.Tensor
    #: int64: the flat positions (of B * S) whose *next* token in the same sample is supervised
    target_index_N: torch.Tensor
    #: int64
    target_ids_N: torch.Tensor
    #: float32
    target_weights_N: torch.Tensor
    #: the sum of its samples' weights
    loss_weight: float
    #: where its samples are preferences
    answers: Answers | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens without padding."""
        return sum(self.row_lengths)

    @property
    def num_positions(self) -> int:
        """Return the number of tokens with padding."""
        return self.input_ids_BS.numel()

    @property
    def num_supervised_tokens(self) -> int:
        return self.target_ids_N.shape[0]

    def sum_by_row(self, values_KN: torch.Tensor) -> torch.Tensor:
        """Sum K values of each target over the targets of each sample, in float64: [K, samples]."""
        num_rows = len(self.row_lengths)
        widths = self.row_lengths if self.packed else (self.input_ids_BS.shape[1],) * num_rows
        ends_R = torch.tensor(list(accumulate(widths)), device=values_KN.device)
        row_N = torch.bucketize(self.target_index_N, ends_R, right=True)
        sums_KR = values_KN.new_zeros((len(values_KN), num_rows), dtype=torch.float64)
        return sums_KR.index_add_(1, row_N, values_KN.double())

    def to(self, device: torch.device) -> Self:
        """Return the micro-batch on `device`, transferred in one copy.

        The copy starts from pinned memory, so the host does not wait for it (CUDA).
        """
        if self.input_ids_BS.device == device:
            return self
        return self.views_of(self.joined().pin_memory().to(device, non_blocking=True))

    def joined(self) -> torch.Tensor:
        """Return the bytes of all tensors one after another, uint8 [bytes]."""
        whole = bytearray().join(part.numpy().tobytes() for part in self.tensors)
        return torch.frombuffer(whole, dtype=torch.uint8)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, as `with_tensors` takes them."""
        if self.answers is None:
            return tuple(getattr(self, name) for name in TENSORS)
        first, last = (getattr(self.answers, name) for name in ANSWER_TENSORS)
        return (first, *(getattr(self, name) for name in TENSORS), last)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Self:
        """Return the same micro-batch with these tensors in place of `tensors`."""
        answers = self.answers
        if answers is not None:
            first, *tensors, last = tensors
            answers = replace(answers, target_place_N=first, facts_R4=last)
        changed: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        return replace(self, answers=answers, **changed)

    def views_of(self, joined: torch.Tensor) -> Self:
        """Return the same micro-batch with tensors that are views of `joined`.

        joined: the result of `self.joined()`, on any device.
        """
        parts = self.tensors
        pieces = joined.split([part.nbytes for part in parts])
        return self.with_tensors(
            [
                piece.view(part.dtype).view(part.shape)
                for piece, part in zip(pieces, parts, strict=True)
            ]
        )
