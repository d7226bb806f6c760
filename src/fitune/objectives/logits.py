"""Compute the logits of supervised tokens: all of them, or those of a chunk of tokens at a time.

An objective of tokens gets here what it needs of the model, whatever it makes of the logits. Shape
suffixes are those of `data/rows.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.config import Auto, Loss
from fitune.data.rows import MicroBatch
from fitune.errors import ModelError
from fitune.model.head import Head, decoder_and_head
from fitune.model.packed_attention import row_boundaries
from fitune.objectives.objective import CHUNK_TOKENS, Chunking, Sweep, has_no_graph

#: The bytes of float32 logits that exist at the same time on a GPU, where a small vocabulary allows
#: larger chunks.
CHUNK_BYTES = 32 * 2**20
#: where even a single sample does not fit otherwise
SMALL_CHUNK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SupervisedTokens:
    """Where an objective gets the logits of supervised tokens (see `Objective`)."""

    #: where the model's body ends and its logits begin; None for the model's own logits (`full`
    #: loss)
    head: Head | None = None
    #: supervised tokens whose logits exist at the same time, if there is a head
    chunk_tokens: int = CHUNK_TOKENS
    #: see `Objective.watched`
    watch: Callable[[list[slice], Sweep], Iterable[slice]] | None = None

    @property
    def chunking(self) -> Chunking | None:
        return None if self.head is None else Chunking(self.chunk_tokens)

    @property
    def surveys(self) -> bool:
        return False

    def survey(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        raise NotImplementedError

    def knowing(self, mean: Tensor) -> Self:
        return self

    @property
    def means(self) -> tuple[str, ...]:
        return ()

    def step_metrics(self, means: Sequence[float]) -> dict[str, float | None]:
        return dict(zip(self.means, means, strict=True))

    def settle(self, rows_KR: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        return rows_KR[0], {}

    def smaller(self, model: nn.Module | None) -> tuple[Self, str] | None:
        """Return the loss in chunks of few tokens, unless it is that already."""
        if self.head is not None and self.chunk_tokens <= SMALL_CHUNK_TOKENS:
            return None
        head: Head | str | None = self.head
        if head is None and model is not None:
            head = decoder_and_head(model)
        if not isinstance(head, Head):
            return None
        return (
            replace(self, head=head, chunk_tokens=SMALL_CHUNK_TOKENS),
            f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time",
        )

    def watched(self, watch: Callable[[list[slice], Sweep], Iterable[slice]]) -> Self:
        return replace(self, watch=watch)

    def chunks(self, num_tokens: int, sweep: Sweep) -> Iterable[slice]:
        """Return the chunks of so many supervised tokens, watched if that is wanted."""
        slices = Chunking(self.chunk_tokens).slices(num_tokens, evaluates=has_no_graph(sweep))
        return slices if self.watch is None else self.watch(slices, sweep)


def choose_tokens(
    model: nn.Module, *, loss: Loss | Auto, device: torch.device
) -> tuple[SupervisedTokens, str | None]:
    """Return where an objective gets the logits of a model, and a note for the user.

    loss: whether the logits are computed in chunks; auto for where the model allows it.

    Raises ModelError if the model does not allow loss=chunked.
    """
    if loss == "full":
        return SupervisedTokens(), None
    head = decoder_and_head(model)
    if isinstance(head, Head):
        return SupervisedTokens(head, choose_chunk_tokens(head, device)), None
    if loss == "chunked":
        raise ModelError(f"loss=chunked does not fit this model: {head}; use loss=full")
    return SupervisedTokens(), f"full logits: {head}"


def choose_chunk_tokens(head: Head, device: torch.device) -> int:
    """Return the number of supervised tokens of a chunk.

    Small chunks leave a GPU waiting for kernel launches, but not a CPU.
    """
    of_card = CHUNK_BYTES // (4 * head.output.weight.shape[0])
    return CHUNK_TOKENS if device.type == "cpu" else max(CHUNK_TOKENS, of_card)


def supervised_logits(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the model's own logits [N, V] at the supervised tokens."""
    logits_BSV = model(**_inputs(micro_batch)).logits
    return cast(Tensor, logits_BSV.flatten(0, 1).index_select(0, micro_batch.target_index_N))


def supervised_hidden(head: Head, micro_batch: MicroBatch) -> Tensor:
    """Return the last hidden states [N, D] at the supervised tokens."""
    hidden_BSD = head.decoder(**_inputs(micro_batch)).last_hidden_state
    return cast(Tensor, hidden_BSD.flatten(0, 1).index_select(0, micro_batch.target_index_N))


def _inputs(micro_batch: MicroBatch) -> dict[str, Any]:
    """Return the arguments of the model's forward, without an attention mask.

    Packed samples have boundaries instead, and causal attention never sees padding on the right.
    """
    inputs = {
        "input_ids": micro_batch.input_ids_BS,
        "position_ids": micro_batch.position_ids_BS,
        "use_cache": False,
    }
    if not micro_batch.packed:
        return inputs
    return inputs | {
        "row_boundaries": row_boundaries(
            micro_batch.row_lengths, device=micro_batch.input_ids_BS.device
        )
    }


def compute_dtype_of(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in.

    Autocast does not act inside a custom autograd function, so it is queried here.
    """
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def transform_logits(raw_NV: Tensor, head: Head) -> Tensor:
    """Apply to the product h @ weight.T + bias what `Head.logits` applies after it, in place."""
    if head.scale != 1:
        raw_NV.mul_(head.scale)
    return (
        raw_NV if head.soft_cap is None else raw_NV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    )


class HeadProduct:
    """The head's logits of hidden states, in the dtype that a linear layer would compute in."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Cast the weight once for all chunks; `hidden_ND` is cast chunk by chunk.

        dtype: of the product; None for that of a linear layer here.
        """
        self._hidden_ND, self._head = hidden_ND, head
        self.dtype = dtype or compute_dtype_of(hidden_ND)
        self.weight_VD = weight_VD.to(self.dtype)
        self._bias_V = None if bias_V is None else bias_V.to(self.dtype)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return the hidden states of a chunk and its float32 logits, which may be overwritten."""
        part_ND = self._hidden_ND[chunk].to(self.dtype)
        raw_NV = F.linear(part_ND, self.weight_VD, self._bias_V).float()
        return part_ND, transform_logits(raw_NV, self._head)


def losses_and_gradient(
    logits_NV: Tensor,
    target_N: Tensor,
    weights_N: Tensor,
    head: Head,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies [N] and the gradient of their weighted sum.

    The gradient is that with respect to `raw_NV` of `transform_logits`: w * scale * (softmax - target) *
    (1 - tanh^2). The logits are overwritten.

    label_smoothing: a share of the target that all V tokens have equally, as in transformers'
        `LabelSmoother` and torch's `cross_entropy`.
    """
    target_N1 = target_N.unsqueeze(1)
    picked_N = logits_NV.gather(1, target_N1).squeeze(1)
    if label_smoothing:
        picked_N = picked_N.lerp_(logits_NV.mean(-1), label_smoothing)
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    slope_NV = (
        None if head.soft_cap is None else logits_NV.div(head.soft_cap).square_().neg_().add_(1)
    )
    grad_NV = logits_NV.sub_(largest_N1).exp_()
    total_N1 = grad_NV.sum(-1, keepdim=True)
    factor_N1 = (weights_N * head.scale).unsqueeze(1)
    of_target = label_smoothing - 1
    grad_NV.mul_(factor_N1 / total_N1).scatter_add_(1, target_N1, of_target * factor_N1)
    if label_smoothing:
        grad_NV.sub_(factor_N1 * (label_smoothing / grad_NV.shape[1]))
    if slope_NV is not None:
        grad_NV.mul_(slope_NV)
    return (largest_N1 + total_N1.log()).squeeze(1) - picked_N, grad_NV


def add_head_gradients(
    grad_NV: Tensor, hidden_ND: Tensor, *, weight_VD: Tensor | None, bias_V: Tensor | None
) -> None:
    """Add what a chunk of tokens adds to the gradients of the head, where these are wanted.

    grad_NV: the gradient of the chunk's logits, in the dtype of the product.
    weight_VD, bias_V: the gradients so far, in the parameters' dtype.
    """
    if weight_VD is not None:
        if grad_NV.dtype == weight_VD.dtype:
            weight_VD.addmm_(grad_NV.T, hidden_ND)
        else:
            weight_VD += grad_NV.T @ hidden_ND
    if bias_V is not None:
        bias_V += grad_NV.sum(0)
