"""Compute the attention of packed samples in one autograd function, from a layer's input on.

A model's own code computes it by some fifteen operators. Each adds a node to autograd's graph and
Python to the forward, which cost a small model on a fast GPU more than the kernels themselves.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fitune.model import packed_attention as kernels
from fitune.model import varlen
from fitune.model.fused_linear import (
    ATTENTION,
    Joined,
    cast_input,
    has_linear,
)
from fitune.model.rotary import Angles, angles_of, random_tensors, rotate_back, rotate_heads
from fitune.model.row_attention import Scoring

_LINEAR = (*ATTENTION, "o_proj")


class _Asked(NamedTuple):
    """What an attention layer asks of the function that attends."""

    head_dim: int
    scale: float | None
    window: int | None


class _Fused(NamedTuple):
    """What replaces the forward of an attention layer."""

    asked: _Asked
    #: query, key and value
    joined: Joined
    #: the last linear layer
    output: Joined


def fuse_attention(model: nn.Module) -> None:
    """Replace the forwards of attention layers, in place.

    A layer is replaced only if it was observed, on random numbers, to do no more than to rotate
    query and key between its linear layers and fitune's attention.
    """
    for module in model.modules():
        asked = _asked_by(module)
        if asked is not None:
            own = getattr(module.__dict__.get("forward"), "__func__", type(module).forward)
            layers: list[Any] = [getattr(module, name) for name in ("q_proj", "o_proj")]
            module.__dict__["fused"] = _Fused(asked, *(layer.joined for layer in layers))
            module.__dict__["casts_input"] = True
            module.forward = MethodType(_forward_after(own), module)


def _forward_after(own: Callable[..., object]) -> Callable[..., object]:
    """Return a forward that calls `own` wherever the fused function does not apply."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        row_boundaries: kernels.RowBoundaries | None = None,
        **more: object,
    ) -> object:
        fused: _Fused = self.fused
        dtype = _dtype_of(fused, hidden_states, row_boundaries)
        if dtype is None or past_key_values is not None or position_embeddings is None:
            (hidden_states,), _ = cast_input(self, (hidden_states,), {})
            more |= {"past_key_values": past_key_values, "row_boundaries": row_boundaries}
            return own(self, hidden_states, position_embeddings, attention_mask, **more)
        boundaries = cast(kernels.RowBoundaries, row_boundaries)
        boundaries.visits.append(1)
        asked = fused.asked
        samples = varlen.PackedSamples(
            boundaries.cumulative, boundaries.longest, asked.scale, asked.window
        )
        projected = fused.joined.product(hidden_states.to(dtype), dtype)
        shape = fused.joined.widths[0] // asked.head_dim, asked.head_dim
        angles = boundaries.angles(*position_embeddings)
        attended = _Attention.apply(projected, *angles, shape, samples)  # type: ignore[no-untyped-call]
        return fused.output.product(attended, dtype), None

    return forward


def _dtype_of(
    fused: _Fused, hidden: Tensor, boundaries: kernels.RowBoundaries | None
) -> torch.dtype | None:
    """Return the dtype to compute in; None if the layer's own code runs."""
    if boundaries is None or boundaries.kernel is not None or torch.compiler.is_compiling():
        return None
    dtype = fused.joined.dtype_on(hidden)
    if dtype is None or fused.output.dtype_on(hidden) is None or varlen.kernels() is None:
        return None
    head_dim = fused.asked.head_dim
    kernel = kernels.choose_kernel(hidden, dtype, (head_dim, head_dim), _PLAIN)
    return dtype if kernel == "varlen" else None


_PLAIN = Scoring(None, 0.0, None, None, None, None)


class _Attention(torch.autograd.Function):
    """Computes the attention of packed samples between the first and the last linear layers.

    projected: [1, T, (H + 2 G) d], query, key and value.
    cos, first, second: the angles of the rotary embeddings, see `Angles`.
    shape: (H, d).

    Returns [1, T, H d]. The product with the weights before it is no part of it, since its backward
    would then find what is saved here still allocated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        cos: Tensor,
        first: Tensor,
        second: Tensor,
        shape: tuple[int, int],
        samples: varlen.PackedSamples,
    ) -> Tensor:
        num_queries, head_dim = shape
        heads = projected.view(*projected.shape[:-1], -1, head_dim)
        num_rotated = (heads.shape[2] + num_queries) // 2
        rotated = rotate_heads(
            heads[:, :, :num_rotated], Angles(cos, first, second), projected.dtype
        ).squeeze(0)
        # As a view the value would keep `projected` allocated until the backward.
        value = heads.squeeze(0)[:, num_rotated:].contiguous()
        parts = rotated[:, :num_queries], rotated[:, num_queries:], value
        attended = cast(varlen.VarlenKernels, varlen.kernels()).attend(*parts, samples)
        ctx.save_for_backward(cos, first, second, *parts, *attended)
        ctx.samples, ctx.num_rotated = samples, num_rotated
        return attended[0].flatten(1)[None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *angles, query_THD, key, value, attended, scores, state = ctx.saved_tensors
        saved = query_THD, key, value, attended, scores, state
        grad_THD = grad_outputs[0].reshape(query_THD.shape)
        of_parts = cast(varlen.VarlenKernels, varlen.kernels()).differentiate(
            grad_THD, saved, ctx.samples
        )
        heads = torch.cat(of_parts, dim=1)[None]
        del of_parts
        of_rotated = heads[:, :, : ctx.num_rotated]
        of_rotated.copy_(rotate_back(of_rotated, Angles(*angles)))
        return heads.flatten(-2), None, None, None, None, None


# ---- which layers --------------------------------------------------------------------------------


def _asked_by(module: nn.Module) -> _Asked | None:
    """Return what the module asks of fitune's attention; None if it does anything else.

    Its own forward is run on random numbers with small weights.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    head_dim = getattr(module, "head_dim", None)
    if name != kernels.NAME or not isinstance(head_dim, int):
        return None
    is_plain = {*module._modules} == {*_LINEAR} and not module._parameters and not module._buffers
    if not is_plain or not has_linear(module, _LINEAR):
        return None
    probe: Any = object.__new__(type(module))
    probe.__dict__.update(module.__dict__ | {"training": True})
    probe.__dict__.pop("forward", None)
    num_queries = 2
    widths = (num_queries * head_dim, head_dim, head_dim)
    hidden, cos, sin, attended, *weights = random_tensors(
        (1, 3, 4), (1, 3, head_dim), (1, 3, head_dim), (1, 3, num_queries, head_dim),
        *((width, 4) for width in widths), (4, widths[0]),
    )  # fmt: skip
    probe._modules = {name: _linear(each) for name, each in zip(_LINEAR, weights, strict=True)}
    calls: list[tuple[Sequence[Tensor], dict[str, Any]]] = []

    def attend(_: object, *parts: Tensor, **options: object) -> tuple[Tensor, None]:
        calls.append((parts[:3], options | {"mask": parts[3:]}))
        return attended, None

    with (
        torch.no_grad(),
        patch.dict(AttentionInterface._global_mapping, {kernels.NAME: attend}),
    ):
        try:
            result, _ = type(module).forward(probe, hidden, (cos, sin), None)
        # Attention of another kind may raise anything.
        except Exception:
            return None
    if len(calls) != 1:
        return None
    parts, options = calls[0]
    scale, window = options.pop("scaling", None), options.pop("sliding_window", None)
    if (
        options.pop("dropout", 0.0)
        or options.pop("mask") != (None,)
        or any(each is not None for each in options.values())
    ):
        return None
    heads = torch.cat([hidden @ weight.T for weight in weights[:3]], -1).unflatten(
        -1, (-1, head_dim)
    )
    rotated = rotate_heads(heads[:, :, : num_queries + 1], angles_of(cos, sin), torch.float32)
    expected = (
        rotated[:, :, :num_queries],
        rotated[:, :, num_queries:],
        heads[:, :, num_queries + 1 :],
    )
    is_equal = all(
        torch.allclose(part.transpose(1, 2), each, rtol=1e-5, atol=1e-6)
        for part, each in zip(parts, expected, strict=True)
    ) and torch.allclose(result, attended.flatten(2) @ weights[3].T, rtol=1e-5, atol=1e-6)
    return _Asked(head_dim, scale, window) if is_equal else None


def _linear(weight: Tensor) -> nn.Linear:
    num_outputs, num_inputs = weight.shape
    layer = nn.Linear(num_inputs, num_outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
