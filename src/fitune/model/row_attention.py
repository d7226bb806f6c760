"""Compute causal attention of whole samples with torch, where no kernel takes packed samples.

Shape suffixes are those of `packed_attention.py`.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, slots=True)
class Scoring:
    """How an attention layer turns queries and keys into weights."""

    #: factor of the scores; 1/sqrt(D) if None
    scaling: float | None
    dropout: float
    #: how many of the last positions a query sees, its own included
    window: int | None
    #: scores become softcap * tanh(score / softcap)
    softcap: float | None
    #: one further score for each head, which takes part in the softmax and is then dropped
    sinks_H: torch.Tensor | None
    #: the kernel of torch to use; None leaves the choice to torch
    backend: SDPBackend | None

    @property
    def needs_steps(self) -> bool:
        """Return whether no fused kernel of torch computes these scores."""
        return self.softcap is not None or self.sinks_H is not None


def attend(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    scoring: Scoring,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention of whole samples, [B, H, S, D].

    There may be keys before the first query (generation with a cache).
    """
    num_queries, num_keys = query_BHSD.shape[2], key_BGSD.shape[2]
    window = scoring.window if scoring.window is not None and scoring.window < num_keys else None
    fused_causal = num_queries == num_keys and window is None and not scoring.needs_steps
    if mask is None and not fused_causal and (num_queries > 1 or window is not None):
        mask = _band(num_queries, num_keys, window, query_BHSD.device)
    if scoring.needs_steps:
        return _attend_in_steps(query_BHSD, key_BGSD, value_BGSD, scoring=scoring, mask=mask)
    with sdpa_kernel(scoring.backend) if scoring.backend is not None else nullcontext():
        return functional.scaled_dot_product_attention(
            query_BHSD,
            key_BGSD,
            value_BGSD,
            attn_mask=mask,
            dropout_p=scoring.dropout,
            is_causal=mask is None and num_queries > 1,
            scale=scoring.scaling,
            enable_gqa=query_BHSD.shape[1] != key_BGSD.shape[1],
        )


def _attend_in_steps(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    scoring: Scoring,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the same as `attend` with materialised scores.

    The softmax is in float32, as in transformers' eager attention.
    """
    repeats = query_BHSD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = (
        part.repeat_interleave(repeats, dim=1) for part in (key_BGSD, value_BGSD)
    )
    scale = scoring.scaling if scoring.scaling is not None else query_BHSD.shape[-1] ** -0.5
    scores = query_BHSD @ key_BHSD.transpose(2, 3) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if scoring.sinks_H is not None:
        sinks = (
            scoring.sinks_H.to(scores.dtype)
            .view(1, -1, 1, 1)
            .expand(scores.shape[0], -1, scores.shape[2], 1)
        )
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value_BHSD.dtype)[
        ..., : key_BHSD.shape[2]
    ]
    return functional.dropout(weights, scoring.dropout) @ value_BHSD


def _band(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Return which keys each query may see, bool [num_queries, num_keys].

    The last query is at the position of the last key.
    """
    distance = (
        torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        - torch.arange(num_keys, device=device)[None, :]
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
