"""The nouns of the data path: one tokenised row, the rows of an optimizer step, the tensors of one forward.

Shape suffixes here and in `step/`:
    B  rows of a micro-batch                    S  positions of a padded row
    T  positions of a micro-batch, flattened (B * S when padded, the sum of the row lengths when packed)
    N  supervised targets of a micro-batch      D  hidden size        V  vocabulary
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised row.

    input_ids: int32 [length]. loss_weights: float32 [length], the weight of token i *as a target*: 0 where it is not
    supervised, 1 for ordinary supervised tokens. loss_weights[0] is 0, since nothing comes before the first token.
    """

    row_id: int
    input_ids: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows that one optimizer step sees, in the sampler's order."""

    rows: tuple[Row, ...]

    @property
    def row_ids(self) -> tuple[int, ...]:
        return tuple(row.row_id for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def num_supervised_tokens(self) -> int:
        return int(sum(np.count_nonzero(row.loss_weights) for row in self.rows))

    @property
    def loss_weight(self) -> float:
        """The N of STEP: what the sum of the token losses is divided by. Equals num_supervised_tokens unless messages
        carry loss weights of their own."""
        return float(sum(row.loss_weights.sum(dtype=np.float64) for row in self.rows))


TENSORS = ("input_ids_BS", "position_ids_BS", "target_index_N", "target_ids_N", "target_weights_N")
"""Of a micro-batch; the widest numbers first, so that each begins where its type may when they are joined."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward sees: tensors, and the same facts as host numbers, so that the step needs no shape
    that depends on data and never waits for the device.

    input_ids_BS, position_ids_BS: int64. Packed: B = 1 and S = T, the rows one after another, positions restart in each
    row. Padded: right-padded rows; the causal mask makes an attention mask unnecessary.
    target_index_N: int64, the flat positions (of B * S) whose *next* token of the same row is supervised.
    target_ids_N: int64. target_weights_N: float32.
    row_lengths: of the rows, host numbers; when packed they are the boundaries between rows.
    loss_weight: host number, the sum of target_weights_N.
    """

    row_ids: tuple[int, ...]
    row_lengths: tuple[int, ...]
    packed: bool
    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    target_index_N: torch.Tensor
    target_ids_N: torch.Tensor
    target_weights_N: torch.Tensor
    loss_weight: float

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.row_lengths)

    @property
    def num_positions(self) -> int:
        """Tokens with padding."""
        return self.input_ids_BS.numel()

    @property
    def num_supervised_tokens(self) -> int:
        return self.target_ids_N.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same on `device`, in one copy; from pinned memory it does not wait (CUDA)."""
        if self.input_ids_BS.device == device:
            return self
        return self.views_of(self.joined().pin_memory().to(device, non_blocking=True))

    def joined(self) -> torch.Tensor:
        """The bytes of all tensors, uint8 [bytes]."""
        whole = bytearray().join(getattr(self, name).numpy().tobytes() for name in TENSORS)
        return torch.frombuffer(whole, dtype=torch.uint8)

    def views_of(self, joined: torch.Tensor) -> Self:
        """The same micro-batch, its tensors views of what `joined` gave, wherever that is now."""
        parts: list[torch.Tensor] = [getattr(self, name) for name in TENSORS]
        pieces = joined.split([part.nbytes for part in parts])
        views = [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return replace(self, **dict(zip(TENSORS, views, strict=True)))
