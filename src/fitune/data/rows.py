"""Define the data types of training: a tokenised sample, a batch, and a micro-batch of tensors.

Shape suffixes here, in `objectives/` and in `step/`:

    B  samples of a micro-batch            S  tokens of a padded sample
    T  tokens of a micro-batch, flattened: B * S when padded, the sum of the lengths when packed
    N  supervised targets of a micro-batch
    D  hidden size                         V  vocabulary size
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised sample."""

    row_id: int
    #: int32 [length]
    input_ids: npt.NDArray[np.int32]
    #: float32 [length]: the weight of token i *as a target*, 1 for an ordinary supervised token
    #: and 0 for one that is not supervised. loss_weights[0] is 0, because no token predicts the
    #: first one.
    loss_weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_weight(self) -> float:
        """Its part of the weight N that the losses of an effective batch are divided by."""
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


#: The tensor fields of `MicroBatch`. The types with the widest elements come first, so that each
#: tensor is aligned when their bytes are joined.
TENSORS = ("input_ids_BS", "position_ids_BS", "target_index_N", "target_ids_N", "target_weights_N")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward and backward pass.

    It contains tensors, and the same facts as Python numbers. With those, no shape in the step
    depends on tensor data, and the step never waits for the device.

    A packed micro-batch has B = 1 and S = T: its samples follow one another, and the positions
    restart at each sample. A padded one has its samples padded on the right; the causal mask makes
    an attention mask unnecessary.
    """

    row_ids: tuple[int, ...]
    #: the tokens of each sample; when packed they define the boundaries between samples
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
        num_rows = len(self.row_ids)
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
        whole = bytearray().join(getattr(self, name).numpy().tobytes() for name in TENSORS)
        return torch.frombuffer(whole, dtype=torch.uint8)

    def views_of(self, joined: torch.Tensor) -> Self:
        """Return the same micro-batch with tensors that are views of `joined`.

        joined: the result of `self.joined()`, on any device.
        """
        parts: list[torch.Tensor] = [getattr(self, name) for name in TENSORS]
        pieces = joined.split([part.nbytes for part in parts])
        views = [
            piece.view(part.dtype).view(part.shape)
            for piece, part in zip(pieces, parts, strict=True)
        ]
        return replace(self, **dict(zip(TENSORS, views, strict=True)))
